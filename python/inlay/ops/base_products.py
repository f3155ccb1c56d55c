"""The frozen product of a linear layer, as fused blocks call it: two static methods without autograd.

forward(x, *tensors) -> y          y  = base(x)
backward_input(dy, *tensors) -> dx dx = dy · W
add_backward_input(dx, dy, *tensors)  optional: dx += dy · W in dx's memory
cast(dtype, *tensors) -> tensors   optional: what autocast would do to these tensors
forward_plus(x, left, right, *tensors)          optional: base(x) + left·rightᵀ, rounded once
backward_input_plus(dy, left, right, *tensors)  optional: dy · W + left·right, rounded once
stack_of(bases, x) -> stack, or None            optional: linears of one input as one product, see `Stack`
forward_lora(x, A, B, s, *tensors) optional: base(x) + s·(x·Aᵀ)·Bᵀ in one op, or None where there is none
terms(dy, *tensors) -> [(left, right)]          optional: dy · W as products of matrices, to sum with others:
add_up(terms, narrow) -> dx                     the sum of those, and of products with narrow matrices
out_in(*tensors) -> weight         optional: the weight as an [out, in] view, for the in-place form
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from inlay.ops._registry import as_rows
from inlay.ops.matmul_sum import matmul_sum, matmul_sum_, packs

#: Operands of products that are added up.
Terms = Sequence[tuple[Tensor, Tensor]]


class BaseProducts(Protocol):
    """What every base offers, as a class with static methods or as an object."""

    def forward(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        """[..., in] -> [..., out]"""

    def backward_input(self, dy: Tensor, *tensors: Tensor | None) -> Tensor:
        """[..., out] -> [..., in]"""


class Stack(Protocol):
    """Several bases of one input as one product; left [M, r] and right are of x's dtype, or both None."""

    def forward(
        self, x: Tensor, tensors: Sequence[tuple], left: Tensor | None, right: Tensor | None, apart: bool
    ) -> list[Tensor]:
        """base_i(x) + left·right_iᵀ, right [Σout, r]; outputs `apart`, or columns of one matrix."""

    def backward_input(
        self, dys: Sequence[Tensor], tensors: Sequence[tuple], left: Tensor | None, right: Tensor | None
    ) -> Tensor:
        """Σ dy_i·W_i + left·right, right [r, in]."""


# --- a base and a narrow product beside it ------------------------------------------------------------------
#
# left·rightᵀ is a low-rank branch or chosen channels: left [M, r], right [N, r], of x's dtype. Added to a finished
# product it would be rounded twice. On a GPU the narrow product comes first and the wide one is summed onto it in fp32:
# as many bytes (y is written, read and written again), one rounding. A CPU that multiplies pairs of bf16 runs both in
# one contraction (matmul_sum.py); other CPUs keep the ways they were measured with.


def wide_sums(x: Tensor) -> bool:
    """True where a narrow product goes into the wide one's sum, and linears of one input into one product."""
    return x.is_cuda


def sums_at_once(base: Any, x: Tensor) -> bool:
    """True where :func:`forward_plus` and :func:`backward_input_plus` are one sum with one rounding."""
    return (wide_sums(x) or packs(x)) and hasattr(base, "forward_plus")


def add_narrow(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y += left·right in the memory of y [..., N], for left [M, r], right [r, N]; of one dtype, or right in fp32."""
    rows = y.view(-1, y.shape[-1])
    if packs(rows):
        matmul_sum_(rows, [left], [right], None, True)
    else:
        rows.addmm_(left, right.to(y.dtype))
    return y


def forward_plus(base: Any, x: Tensor, left: Tensor, right: Tensor, tensors: tuple) -> Tensor:
    """base(x) + left·rightᵀ for x [..., in], left [M, r], right [out, r]; all of one dtype."""
    if sums_at_once(base, x):
        return base.forward_plus(x, left, right, *tensors)
    return add_narrow(base.forward(x, *tensors), left, right.t())


def backward_input_plus(base: Any, dy: Tensor, left: Tensor, right: Tensor, tensors: tuple) -> Tensor:
    """dy·W + left·right for dy [..., out], left [M, r], right [r, in]; all of one dtype."""
    if sums_at_once(base, dy):
        return base.backward_input_plus(dy, left, right, *tensors)
    return add_narrow(base.backward_input(dy, *tensors), left, right)


def product_onto(left: Tensor, right_t: Tensor, x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """left·right_t + x·weight_t (+ bias), [..., out]: in one sum, or the wide product onto the narrow one."""
    if packs(x):
        return matmul_sum([x, left], [weight_t, right_t], bias)
    y = left.mm(right_t) if bias is None else torch.addmm(bias, left, right_t)
    return y.addmm_(as_rows(x), weight_t).view(*x.shape[:-1], y.shape[1])


def _forward(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    return matmul_sum([x], [weight_t], bias) if packs(x) else functional.linear(x, weight_t.t(), bias)


def _backward_input(dy: Tensor, weight: Tensor) -> Tensor:
    return matmul_sum([dy], [weight]) if packs(dy) else dy.matmul(weight)


def _add_up(terms: Terms, narrow: Terms) -> Tensor:
    lefts, rights = zip(*terms, *narrow, strict=True)
    return matmul_sum(lefts, rights)


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.to(dtype) for t in tensors)


class DenseBase:
    """nn.Linear: tensors = weight [out, in], bias [out] or None."""

    cast = staticmethod(_cast)
    add_up = staticmethod(_add_up)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _forward(x, weight.t(), bias)

    @staticmethod
    def backward_input(dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _backward_input(dy, weight)

    @staticmethod
    def terms(dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        return [(dy, weight)]

    @staticmethod
    def add_backward_input(dx: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        dx.view(-1, dx.shape[-1]).addmm_(dy.reshape(-1, dy.shape[-1]), weight)

    @staticmethod
    def forward_plus(x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return product_onto(left, right.t(), x, weight.t(), bias)

    @staticmethod
    def backward_input_plus(
        dy: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return product_onto(left, right, dy, weight)

    @staticmethod
    def out_in(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return weight


class DenseBaseT:
    """transformers' Conv1D: tensors = weight [in, out], bias [out] or None."""

    cast = staticmethod(_cast)
    add_up = staticmethod(_add_up)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _forward(x, weight, bias)

    @staticmethod
    def backward_input(dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _backward_input(dy, weight.t())

    @staticmethod
    def terms(dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        return [(dy, weight.t())]

    @staticmethod
    def add_backward_input(dx: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        dx.view(-1, dx.shape[-1]).addmm_(dy.reshape(-1, dy.shape[-1]), weight.t())

    @staticmethod
    def forward_plus(x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return product_onto(left, right.t(), x, weight, bias)

    @staticmethod
    def backward_input_plus(
        dy: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return product_onto(left, right, dy, weight.t())

    @staticmethod
    def out_in(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return weight.t()
