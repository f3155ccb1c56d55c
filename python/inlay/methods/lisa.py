"""LISA: a few blocks train at a time, drawn anew every K steps; embeddings and head train always.

Source: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
NeurIPS 2024, arXiv:2403.17919, Algorithm 1; defaults of LMFlow: every 20 steps, uniform probabilities. Optimizer states
of a block end with its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..schedules.draws import DrawSome
from ..sites import block_of, blocks_of
from .base import Calibration, register
from .whole import TrainsWhole


@register
@dataclass
class LISA(TrainsWhole):
    """Train ``layers`` random blocks at a time, whole.

    Attributes:
        layers: γ, blocks at a time.
        every: K, optimizer steps between draws.
        probabilities: of the blocks, from the input up; None draws uniformly. Need not sum to 1.
        embeddings: train everything outside the blocks all the time: embeddings, last norm and head. False freezes
            it, so that the backward also stops below the lowest drawn block.
    """

    peft_type: ClassVar[str] = "LISA"
    chooses_over_time: ClassVar[bool] = True

    layers: int = 2
    every: int = 20
    probabilities: Sequence[float] | None = None
    embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1 or self.every < 1:
            raise ValueError(f"wanted layers and every of 1 or more, got {self.layers} and {self.every}")

    def keys(self, model: nn.Module, calibration: Calibration | None) -> list[str]:
        blocks, keys = blocks_of(model), self.candidates(model)
        kept = [key for key in keys if self.embeddings or block_of(key, blocks) is not None]
        there = {block for key in kept if (block := block_of(key, blocks)) is not None}
        if self.layers > len(there):
            raise ValueError(
                f"layers: wanted 1 to {len(there)} blocks at a time, which is all there are, got {self.layers}"
            )
        if self.probabilities is not None and (
            len(self.probabilities) != len(there) or sum(p > 0 for p in self.probabilities) < self.layers
        ):
            raise ValueError(
                f"probabilities: wanted one for each of {len(there)} blocks, {self.layers} of them above 0, got "
                f"{list(self.probabilities)}"
            )
        return kept

    def schedule(self, model: nn.Module) -> DrawSome:
        blocks = blocks_of(model)
        units: dict[str, list[str]] = {}
        always: list[str] = []
        for key in self.keys(model, None):
            block = block_of(key, blocks)
            (always if block is None else units.setdefault(block, [])).append(key)
        return DrawSome(units, always, self.every, self.seed, self.layers, self.probabilities)
