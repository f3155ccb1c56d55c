"""SCT: a small dense map among the salient output channels of each attention.

Source: Zhao et al., "SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels", IJCV 2024,
arXiv:2309.08513: one eighth of the channels (96 of 768), one map with a bias per block, after attention or after the
MLP. The authors' map after attention reads the residual stream behind it, which no weights compute; here it reads what
attention adds to the stream, and so it merges. Their map starts from normal values of 0.02, here it starts from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from ..pieces.linear.channel_map import ChannelMap, ShiftedChannelMap
from ..roles import widths
from ..select import pick_groups, random_groups, salience_scores
from ..sites import LinearSite
from .base import Calibration, Method, Plan, check_one_of, register


@register
@dataclass
class SCT(Method):
    """Train a map ``[k, k]`` among chosen output channels of each target; needs ``tune(..., calibration=batches)``.

    Attributes:
        channels: how many channels of each linear, or which fraction of them.
        strategy: "activation" takes those with the largest activations on calibration data, class by class where
            batches have one label per sample; "random" draws them by ``seed``.
        shift: "mergeable" also trains a shift where the linear has a bias to merge it into; True everywhere, as in the
            paper: a model without biases cannot be merged then; False nowhere.
        target_modules: None means the attention outputs, the authors' default; ["down_proj"] the outputs of MLPs.
    """

    peft_type: ClassVar[str] = "SCT"
    pieces: ClassVar = (ShiftedChannelMap, ChannelMap)

    channels: float | int = 0.125
    strategy: str = "activation"
    shift: bool | str = "mergeable"

    def __post_init__(self) -> None:
        check_one_of("strategy", self.strategy, ("activation", "random"))
        if not isinstance(self.shift, bool):
            check_one_of("shift", self.shift, ("mergeable",))
        held = self.channels
        if not (0 < held <= 1 if isinstance(held, float) else isinstance(held, int) and held >= 1):
            raise ValueError(f"channels: wanted a number of channels, 1 or more, or a fraction in (0, 1], got {held!r}")

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        names = self.linears(model, defaults=("o_proj",))
        counts = {name: self._count(name, widths(model.get_submodule(name))[1]) for name in names}
        if self.strategy == "random":
            totals = {name: widths(model.get_submodule(name))[1] for name in names}
            chosen = {name: random_groups(totals[name], counts[name], self.seed, name) for name in names}
        else:
            scores = salience_scores(model, names, calibration or ())
            for name, score in scores.items():
                if not score.isfinite().all():
                    raise ValueError(f"{name}: activations hold NaN or infinity; check weights and calibration")
            chosen = {name: pick_groups(scores[name], 1, counts[name], "largest") for name in names}
        return Plan({LinearSite(name): partial(self._build, channels=chosen[name], where=name) for name in names})

    def _count(self, name: str, total: int) -> int:
        count = max(1, round(self.channels * total)) if isinstance(self.channels, float) else self.channels
        if count > total:
            raise ValueError(f"{name}: wanted 1 to {total} channels, which is all it has, got channels={count}")
        return count

    def without_data(self) -> Method:
        return replace(self, strategy="random")

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> ChannelMap:
        if "sct_channels" not in tensors:
            raise ValueError(f"{where}: wanted sct_channels, got {sorted(tensors)}; the file is incomplete")
        return self._build(module, channels=tensors["sct_channels"], where=where).load(tensors, where)

    def _build(self, module: nn.Module, *, channels: Tensor, where: str) -> ChannelMap:
        shifts = self.shift is True or (self.shift and getattr(module, "bias", None) is not None)
        return (ShiftedChannelMap if shifts else ChannelMap)(module, channels, where)
