"""The frozen product of a linear layer, as fused blocks call it: two static methods without autograd.

forward(x, *tensors) -> y          y  = base(x)
backward_input(dy, *tensors) -> dx dx = dy · W
add_backward_input(dx, dy, *tensors)  optional: dx += dy · W in dx's memory
cast(dtype, *tensors) -> tensors   optional: what autocast would do to these tensors
forward_lora(x, A, B, s, *tensors) optional: base(x) + s·(x·Aᵀ)·Bᵀ in one op, or None where there is none
out_in(*tensors) -> weight         optional: the weight as an [out, in] view, for the in-place form
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class BaseProducts(Protocol):
    """What every base offers, as a class with static methods or as an object."""

    def forward(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        """[..., in] -> [..., out]"""

    def backward_input(self, dy: Tensor, *tensors: Tensor | None) -> Tensor:
        """[..., out] -> [..., in]"""


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.to(dtype) for t in tensors)


class DenseBase:
    """nn.Linear: tensors = weight [out, in], bias [out] or None."""

    cast = staticmethod(_cast)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward_input(dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return dy.matmul(weight)

    @staticmethod
    def add_backward_input(dx: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        dx.view(-1, dx.shape[-1]).addmm_(dy.reshape(-1, dy.shape[-1]), weight)

    @staticmethod
    def out_in(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return weight


class DenseBaseT:
    """transformers' Conv1D: tensors = weight [in, out], bias [out] or None."""

    cast = staticmethod(_cast)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight.t(), bias)

    @staticmethod
    def backward_input(dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return dy.matmul(weight.t())

    @staticmethod
    def add_backward_input(dx: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        dx.view(-1, dx.shape[-1]).addmm_(dy.reshape(-1, dy.shape[-1]), weight.t())

    @staticmethod
    def out_in(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return weight.t()
