"""Merge an adapter into a checkpoint on disk, tensor by tensor: no model is built, no second copy held."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..bases.linear import is_conv1d
from ..fingerprint import distance, mark, warn_if_off
from ..methods import Method
from ..nn.probe import shallow
from ..ties import sharers
from .base_tables import take_tables
from .changed_rows import ChangedRows, take_changed
from .files import CONFIG_NAME, WEIGHTS_NAME, new_folder, read_json, read_tensors
from .load import check_modules, check_sample, group_by_module, method_of
from .originals import checkpoint_files, stored_key, stored_name
from .tied_files import check_tied, without_tied
from .whole_files import take_whole

#: Weights in other formats: a merged folder that still held them would be loaded unmerged by some readers.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


@torch.no_grad()
def merge_files(base: str | Path, adapter: str | Path, output: str | Path) -> None:
    """Write ``base`` (a dense transformers checkpoint in safetensors) with ``adapter`` in its weights to ``output``.

    Shards keep their names, tensors their dtype and channel order; config, generation config, tokenizer and chat
    template are copied. One shard at a time is in memory. If anything fails, nothing of ``output`` is there.

    Raises:
        FileExistsError: ``output`` holds files.
        ValueError: ``base`` is quantized or lacks a weight the adapter tunes, or is not what it was trained on.
    """
    with new_folder(output) as staged:
        _merge_into(staged, Path(base), Path(adapter))


def _merge_into(output: Path, base: Path, adapter: Path) -> None:
    config = read_json(adapter / CONFIG_NAME)
    method = method_of(config, adapter)
    if method.needs_base:
        raise ValueError(
            f"{method.needs_base} moved a part of the base into the adapter: use inlay.load and inlay.merge"
        )
    files = checkpoint_files(base)
    modules = _modules(base)
    tensors = read_tensors(adapter / WEIGHTS_NAME)
    take_tables(tensors)
    changed = take_changed(tensors, config, adapter)
    whole = _whole_by_stored_name(changed | take_whole(tensors, config, method), base, files, modules)
    grouped = without_tied(modules[""], group_by_module(tensors, adapter), config, adapter)
    check_modules(grouped, config, adapter)
    changes = _by_stored_name(grouped, base, files, modules)
    check_tied(modules[""], grouped, config, method)
    ours = config.get("inlay") or {}
    sample, marks = ours.get("base_sample") or {}, (ours.get("fingerprint") or {}).get("marks", {})
    off: dict[str, float] = {}
    for file in sorted(set(files.values())):
        with safe_open(str(file), framework="pt") as shard:
            tensors, metadata = {key: shard.get_tensor(key) for key in shard.keys()}, shard.metadata()  # noqa: SIM118
        for change in {id(change): change for key, change in changes.items() if key in tensors}.values():
            own = {name: tensors[key] if key in tensors else _read(files, key) for name, key in change.keys.items()}
            path = change.path
            if change.keys["weight"] in tensors:
                check_sample(path, sample.get(path), own["weight"])
                noted = marks.get(f"{path}.weight")
                if noted and (value := distance(noted, mark(own["weight"]))) is not None:
                    off[f"{path}.weight"] = value
            merged = _merged(own, modules[path], method, change)
            tensors |= {key: merged[name] for name, key in change.keys.items() if key in tensors}
        for key in whole.keys() & tensors.keys():
            tensors[key] = _replaced(tensors[key], whole[key], key)
        save_file(tensors, str(output / file.name), metadata=metadata or {"format": "pt"})
    _copy_the_rest(base, output, {file.name for file in files.values()})
    warn_if_off(off, modules, (ours.get("fingerprint") or {}).get("stored", "dense"), "dense", what=str(base))


def _modules(base: Path) -> dict[str, nn.Module]:
    """The modules of the checkpoint's model by name, without weights."""
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


@dataclass(frozen=True)
class _Change:
    """An adapter's ``tensors`` of the module ``path``, and the checkpoint's keys of that module's weight and bias."""

    path: str
    tensors: dict[str, Tensor]
    keys: dict[str, str]


def _by_stored_name(
    grouped: dict[str, dict[str, Tensor]], base: Path, files: dict[str, Path], modules: dict[str, nn.Module]
) -> dict[str, _Change]:
    """What the adapter changes, by each of the checkpoint's keys that it concerns."""
    prefix: Any = getattr(modules[""], "base_model_prefix", "")
    found: dict[str, _Change] = {}
    tied = sharers(modules[""], [path for path in grouped if path in modules])
    for path, held in grouped.items():
        # a checkpoint may hold a weight that several modules share under the name of any of them, or of each
        names = [stored_name(name, prefix, files) for name in (path, *tied.get(path, ()))]
        keys = list(dict.fromkeys(name for name in names if name is not None))
        if not keys or path not in modules:
            raise ValueError(f"the adapter tunes {path!r}, which {base} lacks; merge into the base it was trained on")
        bias = stored_key(f"{path}.bias", prefix, files)
        for key in keys:
            change = _Change(path, held, {"weight": key} if bias is None else {"weight": key, "bias": bias})
            found |= dict.fromkeys(change.keys.values(), change)
    return found


def _read(files: dict[str, Path], key: str) -> Tensor:
    with safe_open(str(files[key]), framework="pt") as shard:
        return shard.get_tensor(key)


def _whole_by_stored_name(
    whole: dict[str, Tensor | ChangedRows], base: Path, files: dict[str, Path], modules: dict[str, nn.Module]
) -> dict[str, Tensor | ChangedRows]:
    """What was trained whole, by the checkpoint's key."""
    prefix: Any = getattr(modules[""], "base_model_prefix", "")
    found: dict[str, Tensor | ChangedRows] = {}
    for key, tensor in whole.items():
        stored = stored_key(key, prefix, files)
        if stored is None:
            raise ValueError(
                f"the adapter trained {key} whole, and {base} has no such tensor (a new head, say): use inlay.load on "
                "a model that has it, then inlay.merge"
            )
        found[stored] = tensor
    return found


def _replaced(held: Tensor, trained: Tensor | ChangedRows, key: str) -> Tensor:
    if held.shape != trained.shape:
        raise ValueError(
            f"{key}: the checkpoint has shape {tuple(held.shape)}, the adapter {tuple(trained.shape)} (a resized "
            "vocabulary, or other labels): use inlay.load and inlay.merge"
        )
    return (trained.onto(held) if isinstance(trained, ChangedRows) else trained).to(held.dtype)


def _merged(own: dict[str, Tensor], like: nn.Module, method: Method, change: _Change) -> dict[str, Tensor]:
    """The module's ``own`` weight and bias with the change in them, as they are stored."""
    module = shallow(like, {}, own)
    conv1d = is_conv1d(module)
    weight = own["weight"].t() if conv1d else own["weight"]
    bias = own.get("bias")
    piece = method.restore(module, change.tensors, change.path)
    try:
        piece.check_merge(bias)
    except ValueError as error:
        raise ValueError(f"{change.path}: {error}") from None
    weight, bias = piece.merge(weight, bias)
    merged = {"weight": weight.t() if conv1d else weight}
    return {name: tensor.contiguous() for name, tensor in (merged | ({} if bias is None else {"bias": bias})).items()}


def _copy_the_rest(base: Path, output: Path, shards: set[str]) -> None:
    for file in sorted(base.iterdir()):
        if file.is_file() and file.name not in shards and file.suffix not in _OTHER_WEIGHTS:
            shutil.copy2(file, output / file.name)
