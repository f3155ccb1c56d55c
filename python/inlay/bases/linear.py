"""Products with a frozen base weight, whatever its storage.

A *base* is a class with two static methods and no state, so that any autograd function can be handed one:

    forward(x, *tensors) -> y                 # [..., in] -> [..., out]
    backward_input(dy, *tensors) -> dx        # [..., out] -> [..., in]

``tensors`` are what holds the weight: ``(weight, bias)`` for a dense base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops._registry import apply, autocast_dtype, without_autocast
from ..ops.base_products import DenseBase, DenseBaseT


class _BaseLinear(torch.autograd.Function):
    """``y = base(x)``, differentiable in ``x`` only. Keeps nothing but the frozen tensors."""

    @staticmethod
    @without_autocast
    def forward(ctx, x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
        ctx.base = base
        ctx.save_for_backward(*tensors)
        return base.forward(x, *tensors)

    @staticmethod
    @without_autocast
    def backward(ctx, dy: Tensor):
        tensors = ctx.saved_tensors  # once: checkpointing recomputes them at each access
        dx = ctx.base.backward_input(dy, *tensors) if ctx.needs_input_grad[0] else None
        return (dx, None, *[None] * len(tensors))


def base_linear(x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
    """``base(x)`` for ``x [..., in]`` -> ``[..., out]``, differentiable in ``x`` only."""
    if base is DenseBase:  # torch's own node is the cheapest, and frozen operands keep nothing
        return nn.functional.linear(x, *tensors)
    if base is DenseBaseT:
        weight, bias = tensors
        assert weight is not None
        return nn.functional.linear(x, weight.t(), bias)
    return apply(_BaseLinear, x.to(autocast_dtype(x)), base, *tensors)


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D``: a linear whose weight is stored ``[in, out]`` (GPT-2)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def is_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear`` and its subclasses, and transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def out_in_view(module: nn.Module) -> Tensor:
    """The dense weight of a linear as ``[out, in]``, a detached view."""
    weight = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight


def base_of(module: nn.Module) -> type:
    """The dense base class that reads ``module.weight`` the way the module itself does."""
    return DenseBaseT if is_conv1d(module) else DenseBase
