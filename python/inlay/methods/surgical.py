"""Surgical fine-tuning by Fisher information: the blocks that the task's gradients care about most train.

Sources: Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", ICLR 2023, arXiv:2210.11466;
Lodha et al., "On Surgical Fine-tuning for Language Encoders", Findings of EMNLP 2023, arXiv:2310.17041: the empirical
diagonal Fisher of a block's weights, from few samples, summed and divided by their number, ranks the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from ..bases.linear import is_linear
from ..select import generator_of
from ..select.fisher import fisher_of_linears
from ..sites import block_of, blocks_of
from .base import Calibration, Method, check_one_of, register
from .freeze_layers import check_share, share_of
from .whole import TrainsWhole


@register
@dataclass
class Surgical(TrainsWhole):
    """Train the ``layers`` blocks with the highest Fisher score, whole; the task's head beside them.

    Attributes:
        layers: how many blocks, or which fraction of them.
        strategy: "fisher" by calibration batches with labels, or "random".
    """

    peft_type: ClassVar[str] = "SURGICAL"

    layers: int | float = 0.25
    strategy: str = "fisher"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("layers", self.layers)
        check_one_of("strategy", self.strategy, ("fisher", "random"))

    def keys(self, model: nn.Module, calibration: Calibration | None) -> list[str]:
        blocks, candidates = blocks_of(model), self.candidates(model)
        allowed = [block for block in blocks if any(key.startswith(f"{block}.") for key in candidates)]
        count = share_of("layers", self.layers, len(allowed))
        if self.strategy == "random":
            random = generator_of(self.seed, "surgical")
            order = [allowed[place] for place in torch.randperm(len(allowed), generator=random).tolist()]
        else:
            scores = self.scores(model, calibration)
            order = sorted(allowed, key=lambda block: -scores[block])
        kept = order[:count]
        return [key for key in candidates if block_of(key, kept) is not None]

    def scores(self, model: nn.Module, calibration: Calibration | None) -> dict[str, float]:
        """Of each block: the mean squared per-sample gradient of its linears' weights, per parameter."""
        fisher = fisher_of_linears(model, calibration or ())
        found = {}
        for block in blocks_of(model):
            inside = [name for name in fisher if name.startswith(f"{block}.")]
            sizes = [m.weight.numel() for n, m in model.named_modules() if n.startswith(f"{block}.") and is_linear(m)]
            found[block] = sum(fisher[name] for name in inside) / max(sum(sizes), 1)
        return found

    def without_data(self) -> Method:
        return replace(self, strategy="random")
