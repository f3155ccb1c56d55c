"""Merge an adapter into a checkpoint on disk, tensor by tensor: no model is built, no second copy held."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..bases.linear import is_conv1d, out_in_view
from ..bases.quantized import dense_linear
from ..fingerprint import distance, mark, warn_if_off
from ..methods import Method
from .files import CONFIG_NAME, WEIGHTS_NAME, read_json, read_tensors
from .load import check_sample, group_by_module, method_of
from .originals import checkpoint_files, stored_key, stored_name
from .whole_files import take_whole

#: Weights in other formats: a merged folder that still held them would be loaded unmerged by some readers.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


@torch.no_grad()
def merge_files(base: str | Path, adapter: str | Path, output: str | Path) -> None:
    """Write ``base`` (a dense transformers checkpoint in safetensors) with ``adapter`` in its weights to ``output``.

    Shards keep their names, tensors their dtype and channel order; config, generation config, tokenizer and chat
    template are copied. One shard at a time is in memory.

    Raises:
        FileExistsError: ``output`` holds files.
        ValueError: ``base`` is quantized or lacks a weight the adapter tunes, or is not what it was trained on.
    """
    base, adapter, output = Path(base), Path(adapter), Path(output)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"wanted a new or empty folder for the merged model, got {output}, which has files")
    config = read_json(adapter / CONFIG_NAME)
    method = method_of(config, adapter)
    if method.needs_base:
        raise ValueError(
            f"{method.needs_base} moved a part of the base into the adapter: use inlay.load and inlay.merge"
        )
    files = checkpoint_files(base)
    linears = _linears(base)
    tensors = read_tensors(adapter / WEIGHTS_NAME)
    whole = _whole_by_stored_name(take_whole(tensors, config, method), base, files, linears)
    changes = _by_stored_name(tensors, adapter, base, files, linears)
    ours = config.get("inlay") or {}
    sample, marks = ours.get("base_sample") or {}, (ours.get("fingerprint") or {}).get("marks", {})
    off: dict[str, float] = {}
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(set(files.values())):
        with safe_open(str(file), framework="pt") as shard:
            tensors, metadata = {key: shard.get_tensor(key) for key in shard.keys()}, shard.metadata()  # noqa: SIM118
        for key in changes.keys() & tensors.keys():
            path, held = changes[key]
            check_sample(path, sample.get(path), tensors[key])
            if (noted := marks.get(f"{path}.weight")) and (value := distance(noted, mark(tensors[key]))) is not None:
                off[f"{path}.weight"] = value
            tensors[key] = _merged(tensors[key], linears[path], method, held, path)
        for key in whole.keys() & tensors.keys():
            tensors[key] = _replaced(tensors[key], whole[key], key)
        save_file(tensors, str(output / file.name), metadata=metadata or {"format": "pt"})
    _copy_the_rest(base, output, {file.name for file in files.values()})
    warn_if_off(off, linears, (ours.get("fingerprint") or {}).get("stored", "dense"), "dense", what=str(base))


def _linears(base: Path) -> dict[str, nn.Module]:
    """The linears of the checkpoint's model by name, without weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(base)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{base} is quantized; pass the dense checkpoint, or use inlay.load and inlay.merge")
    architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModelForCausalLM)
    with torch.device("meta"):
        model = architecture._from_config(config) if hasattr(architecture, "_from_config") else None
        model = model if model is not None else architecture.from_config(config)
    named: dict[str, nn.Module] = dict(model.named_modules())
    named[""] = model
    return named


def _by_stored_name(
    tensors: dict[str, Tensor], adapter: Path, base: Path, files: dict[str, Path], linears: dict[str, nn.Module]
) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """The adapter's tensors of each linear, by the checkpoint's key of its weight."""
    prefix: Any = getattr(linears[""], "base_model_prefix", "")
    found = {}
    for path, held in group_by_module(tensors, adapter).items():
        key = stored_name(path, prefix, files)
        if key is None or path not in linears:
            raise ValueError(f"the adapter tunes {path!r}, which {base} lacks; merge into the base it was trained on")
        found[key] = path, held
    return found


def _whole_by_stored_name(
    whole: dict[str, Tensor], base: Path, files: dict[str, Path], linears: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """What was trained whole, by the checkpoint's key."""
    prefix: Any = getattr(linears[""], "base_model_prefix", "")
    found = {}
    for key, tensor in whole.items():
        stored = stored_key(key, prefix, files)
        if stored is None:
            raise ValueError(
                f"the adapter trained {key} whole, and {base} has no such tensor (a new head, say): use inlay.load on "
                "a model that has it, then inlay.merge"
            )
        found[stored] = tensor
    return found


def _replaced(held: Tensor, trained: Tensor, key: str) -> Tensor:
    if held.shape != trained.shape:
        raise ValueError(
            f"{key}: the checkpoint has shape {tuple(held.shape)}, the adapter {tuple(trained.shape)} (a resized "
            "vocabulary, or other labels): use inlay.load and inlay.merge"
        )
    return trained.to(held.dtype)


def _merged(weight: Tensor, like: nn.Module, method: Method, held: dict[str, Tensor], path: str) -> Tensor:
    conv1d = is_conv1d(like)
    linear = dense_linear(weight.t() if conv1d else weight, None, conv1d)
    merged, _ = method.restore(linear, held, path).merge(out_in_view(linear), None)
    return (merged.t() if conv1d else merged).contiguous()


def _copy_the_rest(base: Path, output: Path, shards: set[str]) -> None:
    for file in sorted(base.iterdir()):
        if file.is_file() and file.name not in shards and file.suffix not in _OTHER_WEIGHTS:
            shutil.copy2(file, output / file.name)
