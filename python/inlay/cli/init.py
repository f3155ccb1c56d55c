"""`inlay init --model FOLDER --data FILE`: a first training config for a model and a data file."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

#: What `inlay train --help` shows and `inlay init` writes; the keys are those of inlay.cli.config.
TEMPLATE = """\
model: {model}
{gguf}method: {{name: S2FT, ratio: 0.03}}  # or {{name: LoRA, r: 16}}; options go inside the braces
# base: nf4                      # quantize the frozen weights: nf4, fp4, int8
data: {data}{about}
max_length: 1024
num_train_epochs: 1              # this and all below: transformers.TrainingArguments
per_device_train_batch_size: 4
learning_rate: 2.0e-3
output_dir: {output}
"""
MINIMAL = TEMPLATE.format(model="path/to/model", gguf="", data="train.jsonl", about="", output="out")


def add_parsers(commands: Any) -> None:
    parser = commands.add_parser("init", help="write a training config for a model and a data file")
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--data", required=True, help="training records: .jsonl, .json or .parquet")
    parser.add_argument("--output-dir", default="out", help="where the adapter will be saved (default: out)")
    parser.add_argument("config", nargs="?", default="inlay.yaml", help="file to write (default: inlay.yaml)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    path = Path(args.config)
    if path.exists():
        raise FileExistsError(f"wanted a new file to write, got {path}, which exists; name another")
    gguf = gguf_file_of(Path(args.model))
    text = TEMPLATE.format(
        model=_scalar(args.model),
        gguf="" if gguf is None else f"gguf_file: {_scalar(gguf)}\n",
        data=_scalar(args.data),
        about=f"  # {format_of(args.data)} records",
        output=_scalar(args.output_dir),
    )
    path.write_text(text, encoding="utf-8")
    print(f"inlay: wrote {path}; next: inlay estimate {path}, inlay train {path}")


def gguf_file_of(folder: Path) -> str | None:
    """The one GGUF file of a folder that has no config.json, else None.

    Raises:
        FileNotFoundError: the folder holds no model. ValueError: it holds several GGUF files.
    """
    if (folder / "config.json").is_file():
        return None
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"wanted one GGUF file in {folder}, got {found}; move the others, or write gguf_file yourself")
    raise FileNotFoundError(
        f"wanted a model folder with a config.json or a .gguf file, got {folder}, which has neither"
    )


def format_of(data: str) -> str:
    """The format of a file's first records; raises as reading them for training would."""
    from ..data.formats import iter_examples, iter_records

    first = list(islice(iter_records(data), 16))
    if not first:
        raise ValueError(f"wanted training records, got {data}, which holds none")
    return [name for name, _ in iter_examples(first, chat=True)][0]


def _scalar(text: str) -> str:
    """``text`` as a YAML scalar, quoted where it must be."""
    return yaml.safe_dump(text, width=10_000).splitlines()[0]
