"""Products with a frozen base weight, whatever its storage.

A *base* is a class with two static methods and no state, so that any autograd function can be handed one:

    forward(x, *tensors) -> y                 # [..., in] -> [..., out]
    backward_input(dy, *tensors) -> dx        # [..., out] -> [..., in]

``tensors`` are what holds the weight: ``(weight, bias)`` for a dense base.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.base_linear import base_linear
from ..ops.base_products import DenseBase, DenseBaseT

__all__ = ["base_linear", "base_of", "is_conv1d", "out_in_view"]


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D``: a linear whose weight is stored ``[in, out]`` (GPT-2)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def out_in_view(module: nn.Module) -> Tensor:
    """The dense weight of a linear as ``[out, in]``, a detached view."""
    weight = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight


def base_of(module: nn.Module) -> type:
    """The dense base class that reads ``module.weight`` the way the module itself does."""
    return DenseBaseT if is_conv1d(module) else DenseBase
