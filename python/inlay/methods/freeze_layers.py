"""Freezing the lower blocks: the backward stops where the upper ones begin.

Source: Lee, Tang, Lin, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", 2019, arXiv:1911.03090:
a quarter of the layers reaches 90% of the quality.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from ..sites import block_of, blocks_of, tensors_around
from .base import Calibration, register
from .whole import TrainsWhole


@dataclass
class TrainsAbove(TrainsWhole):
    """Base of methods that train the model from some block up.

    Attributes:
        head: also train what stands above the blocks: the last norm and the output head. A head that is tied to the
            input embedding stays frozen, since its gradient would have to pass all blocks.
    """

    head: bool = field(default=True, kw_only=True)

    def above(self, model: nn.Module, frozen: int) -> list[str]:
        """The candidates above the lowest ``frozen`` blocks."""
        kept, beside = blocks_of(model)[frozen:], tensors_around(model)[1] if self.head else []
        return [key for key in self.candidates(model) if block_of(key, kept) is not None or key in beside]


@register
@dataclass
class FreezeLayers(TrainsAbove):
    """Train the last blocks and what follows them; everything below is frozen and no backward runs there.

    Attributes:
        layers: how many blocks, or which fraction of them, rounded to the nearest and at least one.
    """

    peft_type: ClassVar[str] = "FREEZE_LAYERS"

    layers: int | float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("layers", self.layers)

    def keys(self, model: nn.Module, calibration: Calibration | None) -> list[str]:
        depth = len(blocks_of(model))
        return self.above(model, depth - share_of("layers", self.layers, depth))


def check_share(option: str, value: int | float) -> None:
    """ValueError unless ``value`` is a count of blocks, or a fraction in (0, 1]."""
    right = 0 < value <= 1 if isinstance(value, float) else isinstance(value, int) and value >= 1
    if not right:
        raise ValueError(f"{option}: wanted a number of blocks, 1 or more, or a fraction in (0, 1], got {value!r}")


def share_of(option: str, value: int | float, depth: int) -> int:
    """How many of ``depth`` blocks ``value`` means; ValueError if there are fewer."""
    count = max(1, round(value * depth)) if isinstance(value, float) else value
    if count > depth:
        raise ValueError(f"{option}: wanted 1 to {depth} blocks, which is all this model has, got {count}")
    return count
