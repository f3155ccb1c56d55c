"""Telly-K: freeze the embedding and the lowest K blocks, fine-tune the rest.

Source: Shi et al., "Towards Efficient Fine-tuning of Pre-trained Code Models: An Experimental Study and Beyond",
ISSTA 2023, arXiv:2304.05216.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..sites import blocks_of
from .base import Calibration, register
from .freeze_layers import TrainsAbove, check_share, share_of


@register
@dataclass
class Telly(TrainsAbove):
    """Train all blocks above the lowest ``frozen_layers``, and what stands above the blocks.

    Attributes:
        frozen_layers: K, a number of blocks or a fraction of them.
    """

    peft_type: ClassVar[str] = "TELLY"

    frozen_layers: int | float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("frozen_layers", self.frozen_layers)

    def keys(self, model: nn.Module, calibration: Calibration | None) -> list[str]:
        depth = len(blocks_of(model))
        frozen = share_of("frozen_layers", self.frozen_layers, depth)
        if frozen == depth and not self.head:
            raise ValueError(f"frozen_layers: all {depth} blocks frozen and head=False leave nothing to train")
        return self.above(model, frozen)
