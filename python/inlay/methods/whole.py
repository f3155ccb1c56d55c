"""What methods share that train tensors of the model itself, whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..bases.quantized import QuantizedWeight
from ..pieces import Piece, Whole
from ..sites import block_of, blocks_of
from ..targets import suffix_match
from .base import Calibration, Method, Plan, check_one_of

ROUNDINGS = ("residual", "stochastic", "fp32")


@dataclass
class TrainsWhole(Method):
    """Base of methods that train tensors whole, in place of the base's own.

    Attributes:
        rounding: of 16-bit weights. "residual" (default) and "stochastic": they stay in their dtype, and
            ``inlay.optim.AdamW(rounding=...)`` of the same name makes small steps count, the former bit for bit as in
            fp32. "fp32": an fp32 copy of each, rounded at every forward, for any optimizer.
        keep_original: False trains in the base's own memory, which saves one copy of what trains; adapters can then
            not be disabled or switched. Merging and saving work either way.
        target_modules: name suffixes of modules or tensors, or None for what the method itself chooses from.
        exclude_modules: name suffixes of modules or tensors to leave frozen.
    """

    rounding: str = "residual"
    keep_original: bool = True

    pieces: ClassVar[tuple[type[Piece], ...]] = ()

    def __post_init__(self) -> None:
        check_one_of("rounding", self.rounding, ROUNDINGS)
        if not self.keep_original and self.rounding == "fp32":
            raise ValueError('keep_original=False trains in place: wanted rounding="residual" or "stochastic"')

    @property
    def holding(self) -> Whole:
        held = "fp32" if self.rounding == "fp32" else "base"
        return Whole(held=held, keep_original=self.keep_original, lazy=self.chooses_over_time)

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        keys = self.keys(model, calibration)
        if not keys:
            raise ValueError(f"{type(self).__name__} found no tensor to train in this {type(model).__name__}")
        packed = [key for key in keys if _is_packed(model, key)]
        if packed:
            raise ValueError(
                f"{packed[0]} trains whole under {type(self).__name__}, and is stored quantized; load the model dense, "
                "leave it out by exclude_modules, or train a delta on it (inlay.LoRA, inlay.S2FT)"
            )
        return Plan(whole=dict.fromkeys(keys, self.holding))

    def keys(self, model: nn.Module, calibration: Calibration | None) -> list[str]:
        """The state-dict keys of what trains."""
        raise NotImplementedError(f"{type(self).__name__} must define keys(model, calibration)")

    def candidates(self, model: nn.Module) -> list[str]:
        """Keys of all parameters of ``model`` that the options do not exclude, tied ones once, in module order; of a
        quantized linear its ``weight``.

        Raises:
            ValueError: a target, an exclusion or a layer names none.
        """
        keys = _all_keys(model)
        targets = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        if targets is not None and targets != ["all-linear"]:
            keys = [key for key in keys if _named(key, _each_names(targets, keys, "target_modules"))]
        if self.exclude_modules is not None:
            excluded = [self.exclude_modules] if isinstance(self.exclude_modules, str) else self.exclude_modules
            keys = [key for key in keys if not _named(key, _each_names(excluded, keys, "exclude_modules"))]
        return in_layers(model, keys, self.layers_to_transform)


def _all_keys(model: nn.Module) -> list[str]:
    found: dict[str, None] = {}
    for key, parameter in model.named_parameters():
        path, _, name = key.rpartition(".")
        if ".deltas." in key:
            continue
        if isinstance(model.get_submodule(path), QuantizedWeight) and name != "bias":
            found[f"{path}.weight"] = None
        elif parameter.is_floating_point():
            found[key] = None
    return list(found)


def _is_packed(model: nn.Module, key: str) -> bool:
    path, _, name = key.rpartition(".")
    return name != "bias" and isinstance(model.get_submodule(path), QuantizedWeight)


def _named(key: str, entries: Iterable[str]) -> bool:
    """Whether a tensor, or a module that it is in, is named by one of ``entries``, as suffixes."""
    parts = key.split(".")
    paths = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return any(suffix_match(path, entry) for path in paths for entry in entries)


def _each_names(entries: Sequence[str], keys: Sequence[str], option: str) -> Sequence[str]:
    for entry in entries:
        if not any(_named(key, [entry]) for key in keys):
            leaves = sorted({part for key in keys for part in key.split(".") if not part.isdigit()})
            raise ValueError(f"{option}: {entry!r} names no tensor to train; names are made of {leaves}")
    return entries


def in_layers(model: nn.Module, keys: list[str], layers: int | Sequence[int] | None) -> list[str]:
    """The keys in the blocks of these numbers; all for None."""
    if layers is None:
        return keys
    count, kept = len(blocks_of(model)), []
    wanted = [layers] if isinstance(layers, int) else list(layers)
    for layer in wanted:
        if not -count <= layer < count:
            raise ValueError(f"layers_to_transform: wanted layers from 0 to {count - 1}, got {layer}")
    places: Any = {layer % count for layer in wanted}
    blocks = blocks_of(model)
    for key in keys:
        block = block_of(key, blocks)
        if block is not None and blocks.index(block) in places:
            kept.append(key)
    return kept
