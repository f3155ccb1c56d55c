"""A frozen linear by itself, and what runs where its weight or bias trains after all.

The fused ops treat a base's tensors as constants. A bias, or a dense weight, that somebody unfreezes beside a delta
gets its gradient from plain autograd: each op asks :func:`trains` first, and composes the same sum of differentiable
parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from inlay.ops._registry import apply, autocast_dtype, fail, without_autocast, without_views
from inlay.ops.base_products import DenseBase, DenseBaseT
from inlay.ops.matmul_sum import packs


def trains(tensors: Sequence[Tensor | None]) -> bool:
    """True where a gradient of one of a base's tensors is wanted."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a loop, not a generator: every linear asks at every call
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class _BaseLinear(Function):
    """``y = base(x)``, differentiable in ``x`` only. Keeps nothing but the frozen tensors."""

    @staticmethod
    @without_views
    @without_autocast
    def forward(ctx: Any, x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
        ctx.base = base
        ctx.save_for_backward(*tensors)
        return base.forward(x, *tensors)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: checkpointing recomputes them at each access
        dx = ctx.base.backward_input(dy, *tensors) if ctx.needs_input_grad[0] else None
        return (dx, None, *[None] * len(tensors))


def _one_dtype(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    return x.dtype == autocast_dtype(x) and all(t is None or t.dtype == x.dtype for t in tensors)


def base_linear(x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
    """``base(x)`` for ``x [..., in]`` -> ``[..., out]``, differentiable in ``x``, a dense weight and the bias.

    Raises:
        TypeError: a scale of a packed weight requires a gradient.
    """
    if trains(tensors[:1]):
        base = getattr(base, "dense", base)  # a weight that trains is multiplied as it is
    if base in (DenseBase, DenseBaseT) and packs(x) and not trains(tensors) and _one_dtype(x, tensors):
        return apply(_BaseLinear, x, base, *tensors)
    if base is DenseBase:  # torch's own node is the cheapest, and frozen operands keep nothing
        return functional.linear(x, *tensors)
    if base is DenseBaseT:
        weight, bias = tensors
        assert weight is not None
        return functional.linear(x, weight.t(), bias)
    x = x.to(autocast_dtype(x))
    if not trains(tensors):
        return apply(_BaseLinear, x, base, *tensors)
    *storage, bias = tensors
    if trains(storage):
        do = "set requires_grad to False on them; a bias, norms and adapters can train"
        fail("base_linear", "base", "frozen scales of a packed weight", "scales that require a gradient", do, TypeError)
    y = apply(_BaseLinear, x, base, *storage, None)
    assert isinstance(bias, Tensor)
    return y + bias.to(y.dtype)
