"""Gradients scaled unit by unit, all the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Run, Schedule


class SoftMask(Schedule):
    """Multiplies the gradient of each weight by a factor per output channel, as it is accumulated: clipping and
    gradient accumulation see the scaled one.

    Args:
        keys: the weights, by state-dict key. sizes: output channels of each. dims: which dimension those are.
        beside: keys of what else trains, unscaled.
        factors: fp32 ``[out]`` in [0, 1] by key; ones where there is none.
    """

    def __init__(
        self,
        keys: Sequence[str],
        sizes: Sequence[int],
        dims: Sequence[int],
        beside: Sequence[str] = (),
        factors: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.keys, self.dims, self.beside = tuple(keys), tuple(dims), tuple(beside)
        for place, (key, size) in enumerate(zip(keys, sizes, strict=True)):
            held = (factors or {}).get(key)
            self.register_buffer(f"factor{place}", torch.ones(size) if held is None else held.float().cpu())

    def chosen(self, run: Run) -> Sequence[str]:
        return (*self.keys, *self.beside)

    def apply(self, run: Run) -> None:
        super().apply(run)
        parameters = run.parameters()
        hooked = self.seen.setdefault("hooked", {})
        for place, (key, dim) in enumerate(zip(self.keys, self.dims, strict=True)):
            parameter = parameters[key]
            if hooked.get(place) != id(parameter):
                parameter.register_hook(_Scale(self, place, dim))
                hooked[place] = id(parameter)


class _Scale:
    """The hook of one parameter: reads the factor at the time, which a checkpoint may have changed."""

    def __init__(self, schedule: SoftMask, place: int, dim: int) -> None:
        self.schedule, self.place, self.dim = schedule, place, dim

    def __call__(self, grad: Tensor) -> Tensor:
        factor: Any = getattr(self.schedule, f"factor{self.place}")
        shape = [1] * grad.dim()
        shape[self.dim] = -1
        return grad * factor.to(grad).view(shape)
