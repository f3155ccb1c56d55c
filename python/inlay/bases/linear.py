"""Products with a frozen base weight, whatever its storage.

A *base* is a class with two static methods and no state, so that any autograd function can be handed one:

    forward(x, *tensors) -> y                 # [..., in] -> [..., out]
    backward_input(dy, *tensors) -> dx        # [..., out] -> [..., in]

``tensors`` are what holds the weight: ``(weight, bias)`` for a dense base.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.base_linear import base_linear
from ..ops.base_products import DenseBase, DenseBaseT
from ..ops.int8_products import Int8Products, Int8ProductsT

__all__ = ["base_linear", "base_of", "computes_linear", "in_int8", "is_conv1d", "is_linear", "out_in_view"]


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D``: a linear whose weight is stored ``[in, out]`` (GPT-2)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def is_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear`` and its subclasses, and transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def computes_linear(module: nn.Module) -> bool:
    """True if a linear computes ``x·Wᵀ + b``: it has nn.Linear's own forward, or one that is proven the same.

    Some routers, heads and grouped projections are subclasses of nn.Linear and compute something else.
    """
    if is_conv1d(module) or type(module).forward is nn.Linear.forward or hasattr(type(module), "inlay_linear"):
        return True
    return type(module).__module__.startswith("bitsandbytes.") or _proven(module)


def _proven(module: nn.Module) -> bool:
    """Run the forward of a subclass on small random weights, over magnitudes, in train and eval mode."""
    random = torch.Generator().manual_seed(20260102)
    like: Any = {"generator": random, "device": "cpu", "dtype": torch.float32}  # a loading model sets other defaults
    twin = copy.copy(module)
    weight, bias = torch.randn(5, 3, **like), torch.randn(5, **like)
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
    twin.__dict__.update(in_features=3, out_features=5)
    for scale in (1e-3, 1.0, 1e4):
        x = torch.randn(2, 4, 3, **like) * scale
        for training in (True, False):
            twin.training = training
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    y = twin(x)
            except Exception:
                return False  # it wants other shapes or arguments than a linear does
            wanted = nn.functional.linear(x, weight, bias)
            if not isinstance(y, Tensor) or y.shape != wanted.shape or not torch.allclose(y, wanted, rtol=1e-4):
                return False
    return True


def out_in_view(module: nn.Module) -> Tensor:
    """The dense weight of a linear as ``[out, in]``, a detached view."""
    weight = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight


def base_of(module: nn.Module) -> type:
    """The dense base class that reads ``module.weight`` the way the module itself does."""
    base = DenseBaseT if is_conv1d(module) else DenseBase
    return in_int8(base) if hasattr(type(module), "inlay_int8") else base


def in_int8(base: Any) -> Any:
    """The base that multiplies what ``base`` reads in 8 bits."""
    return Int8ProductsT if issubclass(base, DenseBaseT) else Int8Products
