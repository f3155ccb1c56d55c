"""SubTuning: blocks are added one by one, each time the one that helps most on held-out data.

Source: Kaplun et al., "Less is More: Selective Layer Finetuning with SubTuning", 2023, arXiv:2302.06354, the greedy
algorithm: train the blocks chosen so far and one more from the pretrained weights, keep the block with the largest
gain, stop when none gains eps. The lengths of the trials are ours, and so is the last quarter of the calibration
batches as held-out data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from ..select import generator_of
from ..select.trial import Batches, mean_loss, train_some, trial
from ..sites import block_of, blocks_of
from .base import Calibration, Method, check_one_of, register
from .freeze_layers import check_share, share_of
from .whole import TrainsWhole


@register
@dataclass
class SubTuning(TrainsWhole):
    """Train the blocks that a greedy search by short trials finds.

    Attributes:
        layers: at most so many blocks, or such a fraction of them.
        eps: the gain in held-out loss below which the search stops.
        probe_steps, probe_lr: of each trial; a search over L blocks runs up to L·layers of them.
        strategy: "greedy", or "random", which needs no data.
    """

    peft_type: ClassVar[str] = "SUBTUNING"

    layers: int | float = 0.25
    eps: float = 0.0
    probe_steps: int = 20
    probe_lr: float = 1e-4
    strategy: str = "greedy"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("layers", self.layers)
        check_one_of("strategy", self.strategy, ("greedy", "random"))
        if self.probe_steps < 1 or not self.probe_lr > 0 or not self.eps >= 0:
            raise ValueError(f"wanted probe_steps >= 1, probe_lr > 0, eps >= 0, got {self}")

    def keys(self, model: nn.Module, calibration: Calibration | None) -> list[str]:
        candidates, blocks = self.candidates(model), blocks_of(model)
        inside: dict[str, list[str]] = {}
        for key in candidates:
            if (block := block_of(key, blocks)) is not None:
                inside.setdefault(block, []).append(key)
        count = share_of("layers", self.layers, len(inside))
        if self.strategy == "random":
            order = torch.randperm(len(inside), generator=generator_of(self.seed, "subtuning")).tolist()
            kept = [list(inside)[place] for place in order[:count]]
        else:
            kept = self.search(model, inside, count, list(calibration or ()))
        return [key for key in candidates if block_of(key, kept) is not None]

    def search(self, model: nn.Module, inside: dict[str, list[str]], count: int, batches: Batches) -> list[str]:
        """The names of the blocks, in the order they were found.

        Raises:
            ValueError: fewer than two batches, or no block gains anything.
        """
        if len(batches) < 2:
            raise ValueError(f"SubTuning wants two calibration batches or more, some held out, got {len(batches)}")
        held = max(1, len(batches) // 4)
        shown, unseen = batches[:-held], batches[-held:]
        with trial(model, []):
            best = mean_loss(model, unseen)
        kept: list[str] = []
        while len(kept) < count:
            losses = {}
            for block in inside:
                if block not in kept:
                    losses[block] = self._try(model, [k for b in (*kept, block) for k in inside[b]], shown, unseen)
            block = min(losses, key=lambda name: losses[name])
            if best - losses[block] <= self.eps:
                break
            kept.append(block)
            best = losses[block]
        if not kept:
            raise ValueError(
                f"no block gains more than eps={self.eps} in held-out loss within {self.probe_steps} steps at "
                f"{self.probe_lr}; raise probe_steps or probe_lr"
            )
        return kept

    def _try(self, model: nn.Module, keys: list[str], shown: Batches, unseen: Batches) -> float:
        with trial(model, keys) as parameters:
            train_some(model, parameters.values(), shown, self.probe_steps, self.probe_lr, self.seed)
            return mean_loss(model, unseen)

    def without_data(self) -> Method:
        return replace(self, strategy="random")
