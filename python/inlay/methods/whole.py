"""What methods share that train tensors of the model itself, whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from ..bases.quantized import QuantizedWeight
from ..pieces import Piece, Whole
from ..sites import block_of, blocks_of, names_above
from ..targets import linears, matches_pattern, output_head_names, suffix_match
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
        target_modules: name suffixes of modules or tensors, a regular expression for the whole name of one,
            "all-linear" (but the output head), or None for what the method itself chooses from.
        exclude_modules: the same, of what stays frozen.
    """

    rounding: str = field(default="residual", kw_only=True)
    keep_original: bool = field(default=True, kw_only=True)

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
        if self.target_modules == "all-linear":
            named = set(linears(model)) - output_head_names(model)
            keys = [key for key in keys if key.rpartition(".")[0] in named]
        elif self.target_modules is not None:
            named = _named(keys, self.target_modules, "target_modules")
            keys = [key for key in keys if key in named]
        if self.exclude_modules is not None:
            named = _named(keys, self.exclude_modules, "exclude_modules")
            keys = [key for key in keys if key not in named]
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


def _named(keys: Sequence[str], entries: str | Sequence[str], option: str) -> set[str]:
    """The tensors among ``keys`` that are named, or in a module that is: by its end, or by a pattern as a whole."""
    found: set[str] = set()
    for entry in [entries] if isinstance(entries, str) else entries:
        matches = matches_pattern if isinstance(entries, str) else lambda entry, path: suffix_match(path, entry)
        hits = {key for key in keys if any(matches(entry, path) for path in names_above(key))}
        if not hits:
            leaves = sorted({part for key in keys for part in key.split(".") if not part.isdigit()})
            raise ValueError(f"{option}: {entry!r} names no tensor to train; names are made of {leaves}")
        found |= hits
    return found


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
