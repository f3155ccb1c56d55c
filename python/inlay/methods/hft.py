"""Half fine-tuning: in every block half of the weights train, the other half stays.

Source: Hui et al., "HFT: Half Fine-Tuning for Large Language Models", ACL 2025, arXiv:2404.18466: half of each
category (attention, feed-forward, norms), chosen anew for every stage of training. Where a category has an odd number
of tensors, blocks take turns with one more and one fewer (ours), so that half of all are trained. What stands outside
the blocks stays frozen, unless ``outside`` (ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..schedules.draws import Draws
from ..sites import block_of, blocks_of, is_norm
from .base import Calibration, register
from .whole import TrainsWhole


class Halves(Draws):
    """Draws half of each group of units; of odd groups every second one has one more."""

    def __init__(
        self, groups: Mapping[str, Mapping[str, Sequence[str]]], always: Sequence[str], every: int, seed: int
    ) -> None:
        super().__init__({name: keys for group in groups.values() for name, keys in group.items()}, always, every, seed)
        self.groups = {group: tuple(units) for group, units in groups.items()}

    def draw(self, random: torch.Generator) -> list[str]:
        more = bool(torch.randint(2, (), generator=random))
        found = []
        for units in self.groups.values():
            count = len(units) // 2 + (len(units) % 2 and more)
            more = more != bool(len(units) % 2)
            found += [units[place] for place in sorted(torch.randperm(len(units), generator=random)[:count].tolist())]
        return found


@register
@dataclass
class HFT(TrainsWhole):
    """Train half of the weights of every block.

    Attributes:
        redraw_every: optimizer steps after which another half is drawn; 0 keeps the first.
        outside: also train what stands outside the blocks: embeddings, last norm, head.
    """

    peft_type: ClassVar[str] = "HFT"
    chooses_over_time: ClassVar[bool] = True

    redraw_every: int = 0
    outside: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.redraw_every < 0:
            raise ValueError(f"redraw_every: wanted a number of steps, or 0 for never, got {self.redraw_every}")

    def keys(self, model: nn.Module, calibration: Calibration | None) -> list[str]:
        blocks = blocks_of(model)
        return [key for key in self.candidates(model) if self.outside or block_of(key, blocks) is not None]

    def schedule(self, model: nn.Module) -> Halves:
        blocks = blocks_of(model)
        groups: dict[str, dict[str, list[str]]] = {}
        always = []
        for key in self.keys(model, None):
            block = block_of(key, blocks)
            if block is None:
                always.append(key)
                continue
            unit = key.rpartition(".")[0]  # a bias goes with its weight
            units = groups.setdefault(f"{block} {_category(model, unit, block)}", {})
            units.setdefault(unit if unit != block else key, []).append(key)
        return Halves(groups, always, self.redraw_every, self.seed)


def _category(model: nn.Module, path: str, block: str) -> str:
    """ "norm", or the part of the block that a module is in: its attention, its feed-forward network."""
    if is_norm(model.get_submodule(path)):
        return "norm"
    return path[len(block) + 1 :].split(".")[0]
