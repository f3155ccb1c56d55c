"""R-Adapter: linear adapters behind attention and MLP that are an ensemble of themselves.

Source: Kim, Jeong, Kim, Kwak, "Efficient and Versatile Robust Fine-Tuning of Zero-shot Models", ECCV 2024,
arXiv:2408.05749, and the authors' code: the adapter is dropped for whole samples in training, a running average of it
takes its place in use, and it is scaled down there, so that the model stays near the pretrained one. Their loss for
image-text pairs (MPM-NCE) is no part of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from ..pieces.linear.output_adapter import (
    AveragedFullOutputAdapter,
    AveragedOutputAdapter,
    FullOutputAdapter,
    OutputAdapter,
)
from ..roles import widths
from ..schedules import Schedule
from ..schedules.averages import Averages
from ..select import generator_of
from ..sites import LinearSite
from .base import Calibration, Method, Plan, register


@register
@dataclass
class RAdapter(Method):
    """Train ``y + s·U·D·y`` behind each attention output and FFN down projection.

    What ``model.eval()`` computes, and what is merged, is the running average, scaled by ``eval_scale``.

    Attributes:
        r: rank; where it is not below the linear's width, one full matrix.
        drop_path: probability with which a sample passes an adapter by, in training.
        ema: how much of the running average an optimizer step keeps; 0 for none, then the trained values are used.
        eval_scale: what the adapter is multiplied by in use; smaller is nearer to the pretrained model.
        target_modules: None means attention outputs and FFN down projections.
    """

    peft_type: ClassVar[str] = "R_ADAPTER"
    pieces: ClassVar = (OutputAdapter, FullOutputAdapter, AveragedOutputAdapter, AveragedFullOutputAdapter)

    r: int = 128
    drop_path: float = 0.2
    ema: float = 0.999
    eval_scale: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r: wanted a rank of 1 or more, got {self.r!r}")
        for name in ("drop_path", "ema"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: wanted a number in [0, 1), got {value}")
        if not 0 < self.eval_scale <= 1:
            raise ValueError(f"eval_scale: wanted a number in (0, 1], got {self.eval_scale}")

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        names = self.linears(model)
        return Plan({LinearSite(name): partial(self._build, where=name) for name in names})

    def schedule(self, model: nn.Module) -> Schedule | None:
        return Averages(self.ema) if self.ema else None

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> OutputAdapter:
        return self._build(module, where=where).load(tensors, where)

    def _build(self, module: nn.Module, *, where: str) -> OutputAdapter:
        is_full = widths(module)[1] <= self.r
        averaged = AveragedFullOutputAdapter if is_full else AveragedOutputAdapter
        made: type[OutputAdapter] = averaged if self.ema else FullOutputAdapter if is_full else OutputAdapter
        return made(module, self.r, self.drop_path, self.eval_scale, generator_of(self.seed, where))
