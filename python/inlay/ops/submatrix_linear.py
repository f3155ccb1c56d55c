"""Submatrix delta: y + x[..., I] · Vᵀ (input channels) or y[..., O] + x · Vᵀ (output channels), V in fp32.

S²FT (Yang et al., 2024, arXiv:2412.06289) trains ΔW[:, I] or ΔW[O, :] of a frozen W [out, in].

  side "in":   V [out, s]   y = round(base(x) + x[..., I]·Vᵀ)         saves x[..., I]
               dV = dyᵀ·x[..., I]      dx = base dx, dx[..., I] += dy·V
  side "out":  V [s, in]    y[..., O] = round(base(x)[..., O] + x·Vᵀ)  saves x
               dV = dy[..., O]ᵀ·x      dx = base dx + dy[..., O]·V

Sums are fp32 and rounded once. The products are torch.mm; raw ops (submatrix.py) do the rest. V takes part in fp32 on a
CPU (as two numbers of bf16 where that has products of bf16 pairs), and rounded to x's 16 bits on a GPU, whose tensor
cores take nothing wider (an H200 does 12 times as many products of 16 bits as of fp32). V itself stays fp32, and is
small beside W, which has 16 bits, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from inlay.ops._registry import (
    apply,
    as_rows,
    autocast_dtype,
    autocast_enabled,
    check_device,
    check_floating,
    check_indices,
    compute_dtype,
    fail,
    without_autocast,
    without_views,
)
from inlay.ops.base_linear import base_linear, trains
from inlay.ops.base_products import DenseBase, DenseBaseT, sums_at_once
from inlay.ops.matmul_sum import matmul_sum, packs
from inlay.ops.submatrix import (
    submatrix_add,
    submatrix_add_,
    submatrix_gather,
    submatrix_grad,
    submatrix_scatter_add_,
    submatrix_write_,
)

__all__ = [
    "DenseBase",
    "DenseBaseT",
    "submatrix_add_delta",
    "submatrix_linear",
    "submatrix_linear_in_place",
]


def _check(op: str, x: Tensor, values: Tensor, indices: Tensor, side: str) -> None:
    check_floating(op, "x", x)
    check_indices(op, indices, x)
    check_device(op, "values", values, "x", x)
    if side not in ("in", "out"):
        fail(op, "side", "'in' or 'out'", repr(side), "say which channels the indices name")
    if values.dtype != compute_dtype(x):
        fail(op, "values", str(compute_dtype(x)), values.dtype, "keep trainable values in fp32", TypeError)
    chosen = values.shape[1 if side == "in" else 0] if values.dim() == 2 else None
    if chosen != indices.shape[0]:
        layout = "[out, s]" if side == "in" else "[s, in]"
        fail(op, "values", f"{layout} with s = {indices.shape[0]}", tuple(values.shape), "match values to indices")


def _product(x: Tensor, values_t: Tensor) -> Tensor:
    """x [..., a] in any float dtype times fp32 [a, b] -> fp32 [..., b]."""
    rows = as_rows(x)
    if packs(rows):
        return matmul_sum([x], [values_t], dtype=values_t.dtype)
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        out = torch.mm(rows, values_t.to(x.dtype), out_dtype=values_t.dtype)
    else:
        out = rows.to(values_t.dtype).mm(values_t)
    return out.view(*x.shape[:-1], values_t.shape[1])


def _beside(x: Tensor, values: Tensor) -> Tensor:
    """`values` as they take part in a sum with products of x: a CPU's kernel takes fp32."""
    return values if packs(x) else values.to(x.dtype)


def forward_with_delta(
    x: Tensor, values: Tensor, indices: Tensor, side: str, base: Any, tensors: tuple
) -> tuple[Tensor, Tensor]:
    """base(x) + x·ΔWᵀ, and what the gradient of `values` needs of x."""
    if side == "in" and sums_at_once(base, x):
        kept = submatrix_gather(x, indices, x.dtype)
        return base.forward_plus(x, as_rows(kept), _beside(x, values), *tensors), kept
    y = base.forward(x, *tensors)
    return y, add_forward(y, x, values, indices, side)


def backward_input_with_delta(
    dy: Tensor, delta_dy: Tensor, values: Tensor, indices: Tensor, side: str, base: Any, tensors: tuple
) -> Tensor:
    """dy·(W + ΔW); delta_dy: see `delta_grad`."""
    if side == "out" and sums_at_once(base, dy):
        return base.backward_input_plus(dy, as_rows(delta_dy), _beside(dy, values), *tensors)
    dx = base.backward_input(dy, *tensors)
    add_backward_input(dx, delta_dy, values, indices, side)
    return dx


def add_forward(y: Tensor, x: Tensor, values: Tensor, indices: Tensor, side: str) -> Tensor:
    """y += x·ΔWᵀ in y's memory; returns what the gradient of `values` needs of x."""
    if side == "in":
        kept = submatrix_gather(x, indices, x.dtype)
        submatrix_add_(y, _product(kept, values.t()))
        return kept
    submatrix_scatter_add_(y, indices, _product(x, values.t()))
    return x


def delta_grad(dy: Tensor, indices: Tensor, side: str) -> Tensor:
    """The part of dy that reaches the delta."""
    return dy if side == "in" else submatrix_gather(dy, indices, dy.dtype)


def add_backward_input(dx: Tensor, delta_dy: Tensor, values: Tensor, indices: Tensor, side: str) -> None:
    """dx += delta_dy·V in dx's memory."""
    product = _product(delta_dy, values)
    if side == "in":
        submatrix_scatter_add_(dx, indices, product)
    else:
        submatrix_add_(dx, product)


class _AddDelta(Function):
    @staticmethod
    @without_views
    @without_autocast
    def forward(ctx: Any, y: Tensor, x: Tensor, values: Tensor, indices: Tensor, side: str) -> Tensor:
        if side == "in":  # one pass over y: the sum goes straight into a new tensor
            kept = submatrix_gather(x, indices, x.dtype)
            out = submatrix_add(y, _product(kept, values.t()))
        else:
            out = y.clone(memory_format=torch.contiguous_format)
            kept = add_forward(out, x, values, indices, side)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(kept if needs[2] else None, values if needs[1] else None, indices)
        ctx.side, ctx.x_shape, ctx.x_dtype = side, x.shape, x.dtype
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, values, indices = ctx.saved_tensors
        dx = dv = None
        delta_dy = delta_grad(dy, indices, ctx.side)
        if ctx.needs_input_grad[1]:
            dx = dy.new_zeros(ctx.x_shape, dtype=ctx.x_dtype)
            add_backward_input(dx, delta_dy, values, indices, ctx.side)
        if ctx.needs_input_grad[2]:
            dv = submatrix_grad(delta_dy, kept)
        return dy if ctx.needs_input_grad[0] else None, dx, dv, None, None


class _Linear(Function):
    """The base product and its delta in one node: dx is one tensor, into which the delta's part is added."""

    @staticmethod
    @without_views
    @without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        side: str,
        base: Any,
        in_place: bool,
        *base_tensors: Tensor,
    ) -> Tensor:
        needs_x, needs_v = ctx.needs_input_grad[:2]
        if not in_place:
            y, kept = forward_with_delta(x, values, indices, side, base, base_tensors)
        else:
            y = base.forward(x, *base_tensors)
            if needs_v:
                kept = submatrix_gather(x, indices, x.dtype) if side == "in" else x
        saved = [kept if needs_v else None, values if needs_x and not in_place else None, indices]
        ctx.save_for_backward(*saved, *(base_tensors if needs_x else ()))
        ctx.side, ctx.base, ctx.in_place, ctx.base_count = side, base, in_place, len(base_tensors)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, values, indices, *base_tensors = ctx.saved_tensors
        dx = dv = None
        delta_dy = delta_grad(dy, indices, ctx.side)
        if ctx.needs_input_grad[1]:
            dv = submatrix_grad(delta_dy, kept)
        if ctx.needs_input_grad[0] and ctx.in_place:
            dx = ctx.base.backward_input(dy, *base_tensors)
        elif ctx.needs_input_grad[0]:
            dx = backward_input_with_delta(dy, delta_dy, values, indices, ctx.side, ctx.base, tuple(base_tensors))
        return dx, dv, None, None, None, None, *([None] * ctx.base_count)


def cast_for_autocast(x: Tensor, base: Any, base_tensors: tuple) -> tuple[Tensor, tuple]:
    """What autocast would do to a linear layer's input and weights, before the Function sees them."""
    if not autocast_enabled(x.device.type):
        return x, base_tensors
    dtype = autocast_dtype(x)
    return x.to(dtype), base.cast(dtype, *base_tensors) if hasattr(base, "cast") else base_tensors


def submatrix_add_delta(y: Tensor, x: Tensor, values: Tensor, indices: Tensor, side: str) -> Tensor:
    """y [..., out] + x [..., in] · ΔWᵀ with one rounding, as a new tensor; differentiable in y, x and values."""
    x = x.to(autocast_dtype(x))
    _check("submatrix_add_delta", x, values, indices, side)
    check_floating("submatrix_add_delta", "y", y)
    check_device("submatrix_add_delta", "y", y, "x", x)
    return apply(_AddDelta, y, x, values, indices, side)


def submatrix_linear(
    x: Tensor, values: Tensor, indices: Tensor, side: str, base: Any, *base_tensors: Tensor | None
) -> Tensor:
    """base(x) + x·ΔWᵀ; differentiable in x and values, and in what of the base trains."""
    if trains(base_tensors):
        return submatrix_add_delta(base_linear(x, base, *base_tensors), x, values, indices, side)
    x, base_tensors = cast_for_autocast(x, base, base_tensors)
    _check("submatrix_linear", x, values, indices, side)
    return apply(_Linear, x, values, indices, side, base, False, *base_tensors)


def submatrix_linear_in_place(
    x: Tensor, values: Tensor, indices: Tensor, side: str, base: Any, *base_tensors: Tensor | None
) -> Tensor:
    """The paper's form: `values` hold the chosen channels themselves and are copied into the weight first."""
    _check("submatrix_linear_in_place", x, values, indices, side)
    write_values(values, indices, side, base, base_tensors)
    if trains(base_tensors):
        weight = base.out_in(*base_tensors)
        weight = weight.index_copy(1 if side == "in" else 0, indices, values.to(weight.dtype))
        return base_linear(x, DenseBase, weight, base_tensors[1])
    x, base_tensors = cast_for_autocast(x, base, base_tensors)
    return apply(_Linear, x, values, indices, side, base, True, *base_tensors)


def write_values(values: Tensor, indices: Tensor, side: str, base: Any, base_tensors: tuple) -> None:
    if not hasattr(base, "out_in"):
        fail(
            "submatrix_write_",
            "base",
            "a dense base",
            base.__name__,
            "use the additive form on a packed base",
            TypeError,
        )
    submatrix_write_(base.out_in(*base_tensors), indices, values, 1 if side == "in" else 0)
