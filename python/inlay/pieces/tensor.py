"""A tensor that trains whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

#: How a tensor that trains whole is held where the base has 16 bits; see :class:`Whole`.
HELD_IN = ("fp32", "base")


@dataclass(frozen=True)
class Whole:
    """What an adapter makes of one tensor of the model: a copy in its place, which trains.

    Attributes:
        value: what the copy starts from; None for the base's own values.
        held: "fp32" keeps an fp32 copy, rounded to the base's dtype at each forward: any optimizer's small steps
            count. "base" keeps the base's dtype: nothing is cast and gradients are half as large; the optimizer has to
            keep what the dtype has no room for (``inlay.optim.AdamW(rounding="residual")``).
        keep_original: False trains the base's own memory, which is half as much: the base is gone then, and adapters
            cannot be disabled or switched.
        lazy: the copy takes memory when it first becomes active, for what a schedule may or may not choose.
    """

    value: Tensor | None = None
    held: str = "fp32"
    keep_original: bool = True
    lazy: bool = False

    def __post_init__(self) -> None:
        if self.held not in HELD_IN:
            raise ValueError(f"held: wanted one of {HELD_IN}, got {self.held!r}")
        if not self.keep_original and self.held != "base":
            raise ValueError('keep_original=False trains the base\'s own memory: wanted held="base", got "fp32"')

    def of(self, value: Tensor) -> Whole:
        """The same with another value."""
        return replace(self, value=value)
