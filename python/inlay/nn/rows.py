"""Samples one after the other in one row, and the mask that says so in two numbers a token.

A mask of N x N would grow with the square of a whole batch's tokens. :class:`RowMask` has its shape and none of its
memory: fused attention asks it for :meth:`RowMask.spans`, and to everybody else it becomes the mask it stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.attention import mask_of

#: What may be asked of a mask without looking into it.
_SHAPE_ONLY = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cpu", "is_meta")
} | {Tensor.dim, Tensor.size, Tensor.is_floating_point}


class RowMask(Tensor):
    """bool ``[1, 1, N, N]``, True where a token sees a key: its own sample's, up to itself.

    Attributes:
        starts: int64 ``[N]``, where the sample of each token begins.
        written: how often somebody has made it the mask it stands for, which costs N x N.
    """

    starts: Tensor
    written: int
    _spans: dict[int | None, Tensor]

    @staticmethod
    def __new__(cls, starts: Tensor) -> RowMask:
        count = starts.numel()
        empty = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=starts.device).expand(1, 1, count, count)
        return Tensor._make_subclass(cls, empty)

    def __init__(self, starts: Tensor) -> None:
        self.starts, self.written, self._spans = starts, 0, {}

    def spans(self, window: int | None = None) -> Tensor:
        """int64 ``[1, N, 2]`` as :func:`inlay.ops.attention` takes them; ``window``: keys that a token sees at most."""
        if window not in self._spans:
            end = torch.arange(1, self.starts.numel() + 1, device=self.starts.device)
            begin = self.starts if window is None else torch.maximum(self.starts, end - window)
            self._spans[window] = torch.stack((begin, end), -1)[None]
        return self._spans[window]

    def mask(self, window: int | None = None) -> Tensor:
        """The mask itself, bool ``[1, 1, N, N]``."""
        self.written += 1
        count = self.starts.numel()
        return mask_of(self.spans(window), count, count, self.starts.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.detach:  # reentrant checkpointing hands its arguments on so
            return args[0]
        if func in _SHAPE_ONLY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_written(args), **_written(kwargs or {}))


def _written(value: Any) -> Any:
    if isinstance(value, RowMask):
        return value.mask()
    if isinstance(value, dict):
        return {key: _written(item) for key, item in value.items()}
    return type(value)(_written(item) for item in value) if isinstance(value, list | tuple) else value
