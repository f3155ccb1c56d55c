"""CoFiTune: one kind of module in a range of depth trains, gradients softened where units matter for what was known.

Source: Zhang et al., "Balancing Speciality and Versatility: a Coarse to Fine Framework for Supervised Fine-tuning Large
Language Model", Findings of ACL 2024, arXiv:2404.10306, and its authors' code: the feed-forward network of the layers
from a quarter to half of the depth; unit importances are standardized per layer, ``I = |tanh((i - mean)/std)|``, and a
weight's gradient rows are multiplied by ``1 - I``. The authors' importances are gradients of unit masks under dropout;
ours are those of the loss on calibration batches of general data, which also exist where a model has no dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bases.linear import is_conv1d, is_linear
from ..schedules.soft_mask import SoftMask
from ..select.units import unit_importance
from ..sites import block_of, blocks_of
from .base import Calibration, Plan, check_one_of, register
from .heads import is_attention
from .whole import TrainsWhole

MODULES = ("ffn", "attention", "both")


@register
@dataclass
class CoFiTune(TrainsWhole):
    """Train feed-forward or attention weights between two depths.

    Attributes:
        modules: "ffn" (default), "attention" or "both".
        depth: where the range begins and ends, as fractions of the number of blocks.
        soft_mask: scale gradients by importance, which wants calibration batches with labels; without, all by 1.
    """

    peft_type: ClassVar[str] = "COFITUNE"

    modules: str = "ffn"
    depth: Sequence[float] = (0.25, 0.5)
    soft_mask: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.depth = list(self.depth)
        check_one_of("modules", self.modules, MODULES)
        if len(self.depth) != 2 or not 0 <= self.depth[0] < self.depth[1] <= 1:
            raise ValueError(f"depth: wanted two fractions 0 <= a < b <= 1, got {self.depth}")

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        plan = super().plan(model, calibration)
        if self.soft_mask:
            plan.schedule = self._masked(model, list(plan.whole), calibration)
        return plan

    def keys(self, model: nn.Module, calibration: Calibration | None) -> list[str]:
        blocks = blocks_of(model)
        first, last = round(self.depth[0] * len(blocks)), max(1, round(self.depth[1] * len(blocks)))
        kept = blocks[min(first, last - 1) : last]
        found = []
        for key in self.candidates(model):
            path = key.rpartition(".")[0]
            if block_of(key, kept) is not None and is_linear(model.get_submodule(path)):
                kind = "attention" if is_attention(model, path) else "ffn"
                found += [key] if self.modules in (kind, "both") else []
        return found

    def schedule(self, model: nn.Module) -> SoftMask | None:
        return self._made(model, self.keys(model, None), {}) if self.soft_mask else None

    def _masked(self, model: nn.Module, keys: list[str], calibration: Calibration | None) -> SoftMask:
        if calibration is None and next(model.parameters()).device.type == "meta":
            return self._made(model, keys, {})  # for estimates, which have no data
        names = [key.rpartition(".")[0] for key in keys if key.endswith(".weight")]
        importance = unit_importance(model, names, calibration or ())
        return self._made(model, keys, {f"{name}.weight": 1 - _normalized(i) for name, i in importance.items()})

    def _made(self, model: nn.Module, keys: list[str], factors: dict[str, Tensor]) -> SoftMask:
        weights = [key for key in keys if key.endswith(".weight")]
        modules: list[Any] = [model.get_submodule(key.rpartition(".")[0]) for key in weights]
        dims = [1 if is_conv1d(module) else 0 for module in modules]
        sizes = [module.weight.shape[dim] for module, dim in zip(modules, dims, strict=True)]
        return SoftMask(weights, sizes, dims, [key for key in keys if key not in weights], factors)


def _normalized(importance: Tensor) -> Tensor:
    spread = importance.std().clamp_min(1e-30) if importance.numel() > 1 else torch.ones(())
    return ((importance - importance.mean()) / spread).tanh().abs()
