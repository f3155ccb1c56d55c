"""PaCA: random input columns of each weight train.

Source: Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025, arXiv:2503.01905.
Options, defaults and files are those of PEFT 0.22's PaCA; it differs from S²FT in that columns belong to no structure
(head or channel pair), and that all linears have as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..bases.linear import out_in_view
from ..pieces.linear.partial_connections import PartialConnections
from ..select import random_groups
from ..sites import LinearSite
from .base import Calibration, Method, Plan, register
from .peft_files import options_in


@register
@dataclass
class PaCA(Method):
    """Train ``r`` random input columns of every targeted linear.

    Attributes:
        r: columns per linear.
        paca_alpha: the change is ``paca_alpha / r`` times what is trained.
        target_modules: None means "all-linear".
    """

    peft_type: ClassVar[str] = "PACA"
    pieces: ClassVar = (PartialConnections,)

    r: int = 8
    paca_alpha: float = 8

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r: wanted a number of columns, 1 or more, got {self.r}")

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        names = self.linears(model, "all-linear")
        return Plan({LinearSite(name): partial(self._build, where=name) for name in names})

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> PartialConnections:
        if "paca_indices" not in tensors:
            raise ValueError(f"{where}: wanted paca_indices, got {sorted(tensors)}; the file is incomplete")
        made = PartialConnections(out_in_view(module), tensors["paca_indices"], self.paca_alpha / self.r, where)
        return made.load(tensors, where)

    def peft_fields(self, pieces: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "r": self.r,
            "paca_alpha": self.paca_alpha,
            "random_seed": self.seed,
            "init_weights": True,
            "target_modules": sorted(pieces),
            "exclude_modules": None,
            "layers_to_transform": None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], where: Path) -> PaCA:
        ignored = ("random_seed", "init_weights")
        return cls(**options_in(config, ("r", "paca_alpha"), where, lambda option, value: option in ignored))

    @classmethod
    def combine(
        cls, methods: Sequence[Method], weights: Sequence[float], parts: Sequence[Mapping[str, Any]]
    ) -> tuple[Method, dict[str, Any]]:
        _, made = super().combine(methods, weights, parts)
        first: Any = methods[0]
        r = max(piece.s2ft_indices.numel() for piece in made.values())
        for piece in made.values():
            piece.pad(min(r, piece.in_features))
        return replace(first, r=r, paca_alpha=r), made

    def _build(self, module: nn.Module, *, where: str) -> PartialConnections:
        weight = out_in_view(module)
        if self.r > weight.shape[1]:
            raise ValueError(f"{where}: r: wanted 1 to {weight.shape[1]} columns, all it has, got {self.r}")
        columns = random_groups(weight.shape[1], self.r, self.seed, where)
        return PartialConnections(weight, columns, self.paca_alpha / self.r, where)
