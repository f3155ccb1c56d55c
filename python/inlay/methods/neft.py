"""NeFT: the neurons that training would turn the most train, the rest is frozen.

Source: Xu et al., "Let's Focus on Neuron: Neuron-Level Supervised Fine-tuning for Large Language Model", COLING 2025,
arXiv:2403.11621: a neuron is a row of a weight; the cosine between a row before and after a trial of plain fine-tuning
ranks them over the whole model, the smallest first. The length of the trial is a choice of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bases.linear import out_in_view
from ..bases.quantized import QuantizedWeight
from ..pieces.linear import SubmatrixDelta
from ..select import random_groups
from ..select.trial import train_some, trial
from ..sites import LinearSite
from .base import Calibration, Method, Plan, check_one_of, register


@register
@dataclass
class NeFT(Method):
    """Train the rows ``ΔW[O, :]`` of the neurons that a short trial moves the most.

    Attributes:
        ratio: fraction of all neurons of the targeted linears to train, in (0, 1].
        probe_steps, probe_lr: optimizer steps of the trial, over and over the calibration batches, and their rate.
            It trains all targets at once and puts them back: it wants the memory of full fine-tuning for a moment, but
            for the gradients, of which there is one at a time.
        strategy: "probe" (the paper's), or "random", which needs no data.
        target_modules: None means "all-linear".
    """

    peft_type: ClassVar[str] = "NEFT"
    pieces: ClassVar = (SubmatrixDelta,)

    ratio: float = 0.06
    probe_steps: int = 100
    probe_lr: float = 1e-4
    strategy: str = "probe"

    def __post_init__(self) -> None:
        check_one_of("strategy", self.strategy, ("probe", "random"))
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio: wanted a fraction of the neurons in (0, 1], got {self.ratio}")
        if self.probe_steps < 1 or not self.probe_lr > 0:
            raise ValueError(
                f"wanted probe_steps of 1 or more and probe_lr > 0, got {self.probe_steps}, {self.probe_lr}"
            )

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        names = self.linears(model, "all-linear")
        chosen = self._random(model, names) if self.strategy == "random" else self._probed(model, names, calibration)
        return Plan({LinearSite(n): partial(_build, indices=rows, where=n) for n, rows in chosen.items()})

    def without_data(self) -> Method:
        return replace(self, strategy="random")

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> SubmatrixDelta:
        if "s2ft_indices" not in tensors:
            raise ValueError(f"{where}: wanted s2ft_indices, got {sorted(tensors)}; the file is incomplete")
        return _build(module, indices=tensors["s2ft_indices"], where=where).load(tensors, where)

    def _random(self, model: nn.Module, names: list[str]) -> dict[str, Tensor]:
        rows = {name: out_in_view(model.get_submodule(name)).shape[0] for name in names}
        return {n: random_groups(count, max(1, round(self.ratio * count)), self.seed, n) for n, count in rows.items()}

    def _probed(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> dict[str, Tensor]:
        for name in names:
            if isinstance(model.get_submodule(name), QuantizedWeight):
                raise ValueError(
                    f'{name}: the trial wants a dense weight, and this one is quantized; strategy="random"'
                )
        batches = list(calibration or ())
        with trial(model, [f"{name}.weight" for name in names]) as weights:
            before = {name: out_in_view(model.get_submodule(name)).clone() for name in names}
            train_some(model, weights.values(), batches, self.probe_steps, self.probe_lr, self.seed)
            likeness = {n: _row_cosines(before.pop(n), out_in_view(model.get_submodule(n))) for n in names}
        count = max(1, round(self.ratio * sum(scores.numel() for scores in likeness.values())))
        worst = torch.cat(list(likeness.values())).sort(stable=True).indices[:count]
        chosen, start = {}, 0
        for name, scores in likeness.items():
            rows = worst[(worst >= start) & (worst < start + scores.numel())] - start
            start += scores.numel()
            if rows.numel():
                chosen[name] = rows.sort().values
        return chosen


def _row_cosines(before: Tensor, after: Tensor) -> Tensor:
    """The cosine of each row ``[out]``, in fp64, where small angles are still seen."""
    return nn.functional.cosine_similarity(before.double(), after.double(), dim=1, eps=1e-30).cpu()


def _build(module: nn.Module, *, indices: Tensor, where: str) -> Any:
    return SubmatrixDelta(out_in_view(module), indices, "out", where)
