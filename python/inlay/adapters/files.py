"""The adapter directory: names, and writing files so that nothing already saved is lost.

adapter_config.json        what PEFT's own config would hold, and an "inlay" section: format version, the method's
                           options, and a few base weights to know the base again; sorted, indented by 2
adapter_model.safetensors  base_model.model.<module>.<tensor>, as PEFT's own code names them
model.safetensors          the same tensors under the tuned model's state-dict keys: what Trainer resumes from
README.md                  a short card
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
RESUME_NAME = "model.safetensors"
CARD_NAME = "README.md"
KEY_PREFIX = "base_model.model."
#: What stands for a module in the keys of a schedule's state.
SCHEDULE = "inlay_schedule"
#: What this inlay reads. An adapter of deltas alone is written as format 1; 2 has tensors trained whole beside them, 3
#: changed rows of such.
FORMAT_VERSION, WHOLE, DELTAS_ONLY = 3, 2, 1


def write_files(directory: Path, files: Mapping[str, Any]) -> None:
    """Write ``files`` to ``directory`` by name: tensors (.safetensors), a JSON object (.json), or text.

    All are written under temporary names first and renamed last: if one fails, every file is the old one still.
    """
    directory.mkdir(parents=True, exist_ok=True)
    staged = {name: directory / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, path in staged.items():
            _write(path, Path(name).suffix, files[name])
        for name, path in staged.items():
            os.replace(path, directory / name)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder beside ``output`` to write to, which becomes ``output`` when all is written; gone if anything fails.

    Raises:
        FileExistsError: ``output`` holds files, is a file, or is where a file system is mounted.
    """
    output = Path(output).resolve()
    # Writing a model over something else has cost people their base model.
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"wanted a new or empty folder for the output, got {output}, which has files; remove it first"
        )
    if output.is_mount():
        raise FileExistsError(f"wanted a folder that can be written beside and renamed, got the mount {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    staged.mkdir()
    try:
        yield staged
        if output.exists():
            output.rmdir()  # empty: not every system renames over a folder
        staged.rename(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write(path: Path, suffix: str, content: Any) -> None:
    if suffix == ".safetensors":
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
        save_file(held, str(path), metadata={"format": "pt"})
        return
    text = json.dumps(content, indent=2, sort_keys=True) if suffix == ".json" else content
    path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; ValueError if it is missing, truncated or no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"wanted an adapter directory, found no {path.name} in {path.parent}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}); the file is corrupt: save the adapter again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: wanted a JSON object, got {type(values).__name__}")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors in ``path``; ValueError if it is missing, truncated or corrupt."""
    if not path.is_file():
        raise ValueError(f"wanted adapter weights, found no {path.name} in {path.parent}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); the file is truncated or corrupt") from None


def base_path_of(model: Any) -> str | None:
    """Where the base model came from, as transformers recorded it."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None) or None


def peft_keys(model: Any) -> dict[str, Any]:
    """The keys PEFT's own ``PeftConfig`` writes for every method."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_path_of(model),
        "inference_mode": True,
        "revision": None,
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    }
