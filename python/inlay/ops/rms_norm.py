"""RMSNorm: y = x · rstd · (offset + weight), rstd = 1/sqrt(mean(x²) + eps); offset is 1 in Gemma's convention.

  backward  t = dy·(offset + weight)    dx = rstd·(t − x·rstd²·mean(t·x))    dweight = Σ dy·x·rstd

Math in fp32 and one rounding (transformers rounds twice and keeps fp32 copies of x for autograd). Kept for the
backward: x, rstd [M], weight. y has x's dtype whatever the weight's, dweight the weight's. Where both gradients are
wanted, one pass over dy and x forms both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from inlay._native import module
from inlay.ops._column_sums import share_sums
from inlay.ops._registry import (
    apply,
    as_rows,
    check_device,
    check_floating,
    check_same,
    compute_dtype,
    fail,
    raw_op,
    without_autocast,
    without_views,
)


def _check(op: str, x: Tensor, weight: Tensor | None) -> None:
    check_floating(op, "x", x)
    if weight is None:
        return
    check_floating(op, "weight", weight)
    check_device(op, "weight", weight, "x", x)
    if weight.shape != x.shape[-1:]:
        fail(op, "weight", f"shape {tuple(x.shape[-1:])}", tuple(weight.shape), "one weight per channel")


def _scale(weight: Tensor | None, offset: float, wide: torch.dtype) -> Tensor | float:
    return weight.to(wide) + offset if weight is not None else 1.0


def _forward_native(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    _check("rms_norm_forward", x, weight)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    weight = None if weight is None else weight.contiguous()
    module().rms_norm_forward(as_rows(y), rstd.view(-1), as_rows(x), weight, eps, offset)
    return y, rstd


def _forward_fake(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=compute_dtype(x))


@raw_op(native=_forward_native, fake=_forward_fake)
def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x [..., H], weight [H] of any float dtype or None (scale 1) -> y [..., H], rstd fp32 [...]"""
    _check("rms_norm_forward", x, weight)
    wide = x.to(compute_dtype(x))
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    y = wide * rstd.unsqueeze(-1) * _scale(weight, offset, wide.dtype)
    return y.to(x.dtype).contiguous(), rstd


def _check_backward(dy: Tensor, x: Tensor, weight: Tensor | None, needs_dweight: bool) -> None:
    _check("rms_norm_backward", x, weight)
    check_same("rms_norm_backward", "dy", dy, "x", x, shape=True)
    if needs_dweight and weight is None:
        fail("rms_norm_backward", "weight", "a weight, since its gradient is asked for", None, "ask for dx alone")


def _backward_native(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    _check_backward(dy, x, weight, needs_dweight)
    dx, dweight = _backward_fake(dy, x, weight, rstd, offset, needs_dx, needs_dweight)
    weight = None if weight is None else weight.contiguous()
    written = (
        as_rows(dx) if needs_dx else None,
        dweight if needs_dweight else None,
        share_sums(x, x.shape[-1]) if needs_dweight else None,
    )
    if needs_dx or needs_dweight:
        module().rms_norm_backward(*written, as_rows(dy), as_rows(x), weight, rstd.reshape(-1), offset)
    return dx, dweight


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs_dx else 0)
    return dx, x.new_empty(0) if weight is None or not needs_dweight else weight.new_empty(weight.shape)


@raw_op(native=_backward_native, fake=_backward_fake)
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    """dy, x [..., H], rstd [...] -> dx [..., H], dweight [H] in the weight's dtype; [0] for what is not needed."""
    _check_backward(dy, x, weight, needs_dweight)
    dx, dweight = _backward_fake(dy, x, weight, rstd, offset, needs_dx, needs_dweight)
    wide = compute_dtype(x)
    grad, rstd = dy.to(wide), rstd.unsqueeze(-1)
    normed = x.to(wide) * rstd
    if needs_dx:
        t = grad * _scale(weight, offset, wide)
        dx = (rstd * (t - normed * (t * normed).mean(-1, keepdim=True))).to(x.dtype).contiguous()
    if needs_dweight:
        dweight = as_rows(grad * normed).sum(0).to(dweight.dtype)
    return dx, dweight


class _RMSNorm(Function):
    @staticmethod
    @without_views
    @without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        y, rstd = rms_norm_forward(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        dx, dweight = rms_norm_backward(dy, x, weight, rstd, ctx.offset, *needs)
        return dx if needs[0] else None, dweight if needs[1] else None, None, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """x [..., H] -> x·rstd·(offset + weight) in x's dtype; differentiable in x and weight."""
    return apply(_RMSNorm, x, weight, float(eps), float(offset))
