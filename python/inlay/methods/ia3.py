"""(IA)³: learned vectors on keys, values and the inner activations of feed-forward networks.

Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS
2022, arXiv:2205.05638; their T-Few trains at a learning rate of 3e-3. Adapter files are PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..pieces.linear.rescale import PartRescale, Rescale
from ..roles import roles
from ..sites import LinearSite
from ..targets import resolve, suffix_match
from .base import Calibration, Method, Plan, register
from .peft_files import options_in
from .projections import fused_parts, is_fused, keys_and_values


@register
@dataclass
class IA3(Method):
    """Train a vector that rescales keys, one for values, and one for the input of each FFN down projection.

    Attributes:
        feedforward_modules: name suffixes of those targets whose input is rescaled instead of the output; None for the
            FFN down projections, found by structure.
        target_modules: None means keys, values and FFN down projections. Of a linear that makes queries too, the
            channels of keys and values; all of it where its layout is not known.
    """

    peft_type: ClassVar[str] = "IA3"
    pieces: ClassVar = (PartRescale, Rescale)

    feedforward_modules: str | Sequence[str] | None = None

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        names = self.linears(model, self._defaults(model) if self.target_modules is None else None)
        inputs = self._inputs(model, names)
        plan = Plan()
        for name in names:
            parts = None if name in inputs else fused_parts(model, name)
            channels = None if parts is None else parts.both
            plan.pieces[LinearSite(name)] = partial(
                self._build, side="in" if name in inputs else "out", channels=channels, where=name
            )
        return plan

    def _defaults(self, model: nn.Module) -> list[str]:
        projections = keys_and_values(model)
        down = [name for name, role in roles(model).items() if role == "down_proj"]
        if not projections:
            what = f"this {type(model).__name__}"
            fused = next((name for name, _ in model.named_modules() if is_fused(name)), None)
            raise ValueError(
                f"IA3 found no projection of keys and values in {what}: pass target_modules"
                + (f"; {fused} makes all at once in an order that is not known, and is rescaled whole" if fused else "")
            )
        return [*projections, *down]

    def _inputs(self, model: nn.Module, names: Sequence[str]) -> set[str]:
        """Those of ``names`` whose input is rescaled."""
        if self.feedforward_modules is None:
            played = roles(model)
            return {name for name in names if played.get(name) == "down_proj"}
        given = self.feedforward_modules
        if isinstance(given, str):
            return set(resolve(model, given)) & set(names)
        for entry in given:
            if not any(suffix_match(name, entry) for name in names):
                raise ValueError(
                    f"feedforward_modules: {entry!r} is none of the tuned linears, which end in "
                    f"{sorted({name.rpartition('.')[2] for name in names})}"
                )
        return {name for name in names if any(suffix_match(name, entry) for entry in given)}

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> Rescale:
        held = tensors.get("ia3_l")
        if held is None or held.dim() != 2:
            got = sorted(tensors) if held is None else f"shape {tuple(held.shape)}"
            raise ValueError(f"{where}: wanted ia3_l, [out, 1] or [1, in], got {got}; the file is incomplete")
        side = "in" if held.shape[0] == 1 and held.shape[1] != 1 else "out"
        piece = self._build(module, side=side, channels=tensors.get("ia3_channels"), where=where)
        return piece.load(tensors, where)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], where: Path) -> IA3:
        ignored = ("fan_in_fan_out", "init_ia3_weights")
        return cls(**options_in(config, ("feedforward_modules",), where, lambda option, value: option in ignored))

    def peft_fields(self, pieces: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "target_modules": sorted(pieces),
            "feedforward_modules": sorted(name for name, piece in pieces.items() if piece.side == "in"),
            "exclude_modules": None,
            "fan_in_fan_out": any(piece.transposed for piece in pieces.values()),
            "init_ia3_weights": True,
        }

    def _build(self, module: nn.Module, *, side: str, channels: Tensor | None, where: str) -> Rescale:
        return Rescale(module, side) if channels is None else PartRescale(module, channels, where)
