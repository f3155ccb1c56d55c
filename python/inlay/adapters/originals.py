"""The dense weights a model was quantized from, read tensor by tensor from its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from ..bases.quantized import QuantizedWeight
from ..vocabulary import checkpoint_directory
from .files import base_path_of

#: Mean |difference| over rms above which weights are another model's: four bits move them by about 0.09.
_OTHER_WEIGHTS = 0.3


class Originals:
    """Dense weights in the safetensors of ``directory``, which are memory-mapped: one tensor at a time is read."""

    def __init__(self, directory: Path, prefix: str = "") -> None:
        """``prefix``: what heads put before the names of their base model, e.g. "model"."""
        self.directory, self.prefix = directory, prefix
        self._files = checkpoint_files(directory)
        self._open: dict[Path, Any] = {}

    def has(self, name: str) -> bool:
        """Whether the linear ``name`` is there, dense."""
        key = self._key(name)
        return key is not None and self._shard(key).get_slice(key).get_dtype().startswith(("F", "BF"))

    def weight(self, name: str, module: QuantizedWeight) -> Tensor:
        """The dense ``[out, in]`` weight of ``module`` in its compute dtype.

        Raises:
            ValueError: it is missing, of another shape, or another model's.
        """
        key = self._key(name)
        if key is None or not self.has(name):
            raise ValueError(f"{self.directory} holds no dense {name}.weight; pass originals= the dense checkpoint")
        weight = self._shard(key).get_tensor(key)
        weight = weight.t() if module.conv1d else weight
        if weight.shape != (module.out_features, module.in_features):
            wanted = (module.out_features, module.in_features)
            raise ValueError(f"{self.directory}: {key}: wanted shape {wanted}, got {tuple(weight.shape)}")
        base = module.dense_base(module.compute_dtype)
        weight = weight.to(base.device, module.compute_dtype)
        distance = (weight.float() - base.float()).abs().mean() / weight.float().square().mean().sqrt().clamp_min(1e-30)
        if not distance <= _OTHER_WEIGHTS:
            raise ValueError(
                f"{self.directory}: {key} differs from the quantized weight by {float(distance):.2f} of its size: this "
                "is not what the model was quantized from"
            )
        return weight

    def _key(self, name: str) -> str | None:
        return stored_name(name, self.prefix, self._files)

    def _shard(self, key: str) -> Any:
        file = self._files[key]
        if file not in self._open:
            self._open[file] = safe_open(str(file), framework="pt").__enter__()
        return self._open[file]


def find_originals(model: nn.Module, given: str | Path | None, names: list[str]) -> Originals | None:
    """The dense weights of the linears ``names``: in ``given``, else where the model was loaded from, else None.

    Raises:
        ValueError: ``given`` is no directory with safetensors, or lacks a weight.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if given is not None:
        originals = Originals(Path(given), prefix)
        for name in names:
            if not originals.has(name):
                raise ValueError(f"originals={given} holds no dense {name}.weight; pass the dense checkpoint")
        return originals
    directory = checkpoint_directory(base_path_of(model))
    if directory is None:
        return None
    try:
        originals = Originals(directory, prefix)
    except ValueError:
        return None
    return originals if all(originals.has(name) for name in names) else None


def stored_name(name: str, prefix: str, keys: Collection[str]) -> str | None:
    """The key of the weight of linear ``name`` in a checkpoint, which may lack or have its model's ``prefix``."""
    return stored_key(f"{name}.weight", prefix, keys)


def stored_key(key: str, prefix: str, keys: Collection[str]) -> str | None:
    """The key of a model's tensor in a checkpoint, which may lack or have its model's ``prefix``."""
    return next((k for k in (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}") if k in keys), None)


def checkpoint_files(directory: Path) -> dict[str, Path]:
    """The safetensors file of each tensor of a checkpoint; ValueError if there is none."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return {key: directory / file for key, file in json.loads(index.read_text())["weight_map"].items()}
    single = directory / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"wanted a directory with model.safetensors, found none in {directory}")
    with safe_open(str(single), framework="pt") as file:
        return {key: single for key in file.keys()}  # noqa: SIM118 (no iterator)
