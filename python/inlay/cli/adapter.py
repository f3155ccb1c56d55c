"""`inlay merge`, `inlay export`, `inlay verify`: what becomes of an adapter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .models import add_model_arguments, fill_from_config, load_model

DEFAULT_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
)


def add_parsers(commands: Any) -> None:
    merge = commands.add_parser("merge", help="write base + adapter as a plain model")
    add_model_arguments(merge, adapter=True)
    merge.add_argument("--output", required=True, help="folder to write")
    merge.set_defaults(run=run_merge)

    export = commands.add_parser("export", help="write the adapter in another library's format")
    add_model_arguments(export, adapter=True)
    export.add_argument("--output", required=True, help="folder to write")
    export.add_argument("--format", default="peft-lora", help="peft-lora (default) or vllm-lora")
    export.set_defaults(run=run_export)

    verify = commands.add_parser("verify", help="compare a merged model with base + adapter; status 1 over tolerance")
    add_model_arguments(verify, adapter=True)
    verify.add_argument("--merged", required=True, help="folder of the merged model")
    verify.add_argument("--tolerance", type=float, help="largest |logit difference| that counts as equal")
    verify.add_argument("--prompts", help="text file, one prompt per line")
    verify.set_defaults(run=run_verify)


def run_merge(args: argparse.Namespace) -> None:
    from ..adapters import merge, merge_files
    from ..adapters.files import new_folder

    args = fill_from_config(args)
    if (
        args.adapter is not None
        and args.gguf_file is None
        and args.dtype in (None, "auto", "checkpoint")
        and _is_dense(args.model)
    ):
        merge_files(args.model, args.adapter, args.output)
        print(f"inlay: merged model saved in {args.output}")
        return
    with new_folder(args.output) as staged:
        model, tokenizer = _load_tuned(args)
        merge(model).save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    print(f"inlay: merged model saved in {args.output}")


def run_export(args: argparse.Namespace) -> None:
    from ..adapters import export
    from ..adapters.files import new_folder

    with new_folder(args.output) as staged:
        model, _ = _load_tuned(args)
        export(model, staged, format=args.format)
    print(f"inlay: {args.format} adapter saved in {args.output}")


def run_verify(args: argparse.Namespace) -> int:
    from ..adapters import verify

    prompts = _read_prompts(args.prompts) if args.prompts else list(DEFAULT_PROMPTS)
    model, tokenizer = _load_tuned(args)
    plain, _ = load_model(args.merged, dtype=_as_stored(args.dtype))
    result = verify(model, plain, prompts, tokenizer=tokenizer)
    print(f"inlay: {result}")
    # In bf16 a merge rounds once more than base + adapter does, and a near-tie may then go the other
    # way: only a tolerance that was asked for makes a difference a failure.
    return 0 if args.tolerance is None or result.max_logit_diff <= args.tolerance else 1


def _load_tuned(args: argparse.Namespace) -> tuple[Any, Any]:
    from ..tune import load

    args = fill_from_config(args)
    if args.adapter is None:
        raise ValueError("wanted an adapter, got none; pass --adapter FOLDER or a training config with output_dir")
    model, tokenizer = load_model(args.model, args.gguf_file, _as_stored(args.dtype))
    return load(model, args.adapter).eval(), tokenizer


def _as_stored(dtype: str | None) -> str | None:
    """What is written keeps the checkpoint's dtype, unless one is named: "auto" is for what is computed."""
    return None if dtype == "auto" else dtype


def _is_dense(model: str) -> bool:
    """Whether ``model`` is a folder with a dense checkpoint in safetensors, which needs no model to be merged into."""
    folder = Path(model)
    config = folder / "config.json"
    return (
        any(folder.glob("*.safetensors"))
        and config.is_file()
        and "quantization_config" not in json.loads(config.read_text(encoding="utf-8"))
    )


def _read_prompts(path: str) -> list[str]:
    prompts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"wanted one prompt per line in {path}, got an empty file")
    return prompts
