"""GreenTrainer: the tensors that matter most for the loss, within a share of full fine-tuning's cost.

Source: Huang et al., "Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation", ICLR 2024,
arXiv:2309.13192, and its authors' code: importance is the loss reduction to first order, the choice a dynamic program
over depth in which a gradient pays for what it passes. Costs are weighed by measured times (ours), or counted FLOPs;
importance is taken from one real step instead of a trial whose weights are put back (ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..schedules.green import Green
from .base import Calibration, check_one_of, register
from .whole import TrainsWhole


@register
@dataclass
class GreenTrainer(TrainsWhole):
    """Train what is worth most within ``rho`` of full fine-tuning's step; chosen anew every ``every`` steps.

    Attributes:
        rho: the share of full fine-tuning's cost, forward included, so that it is above a third.
        every: optimizer steps between choices (the paper's epochs).
        cost: "measured" takes seven steps at the start, of different depth, to measure the forward, the passing of
            gradients and the weight gradients on this machine; "flops" counts, and is the same everywhere.
    """

    peft_type: ClassVar[str] = "GREENTRAINER"
    chooses_over_time: ClassVar[bool] = True

    rho: float = 0.5
    every: int = 200
    cost: str = "measured"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("cost", self.cost, ("measured", "flops"))
        if not 1 / 3 < self.rho <= 1:
            raise ValueError(
                f"rho: wanted a share in (1/3, 1]: the forward is a third of full fine-tuning's work, got {self.rho}"
            )
        if self.every < 2:
            raise ValueError(f"every: wanted 2 steps or more, the first of which weighs all tensors, got {self.every}")

    def keys(self, model: nn.Module, calibration: Calibration | None) -> list[str]:
        return self.candidates(model)

    def schedule(self, model: nn.Module) -> Green:
        return Green(self.keys(model, None), self.rho, self.every, self.cost == "measured")
