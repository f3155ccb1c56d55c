"""RMSNorm: y = x · rstd · (offset + weight), rstd = 1/sqrt(mean(x²) + eps); offset is 1 in Gemma's convention.

  backward  t = dy·(offset + weight)    dx = rstd·(t − x·rstd²·mean(t·x))    dweight = Σ dy·x·rstd

Math in fp32 and one rounding (transformers rounds twice and keeps fp32 copies of x for autograd). Kept for the
backward: x, rstd [M], weight. y has x's dtype whatever the weight's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from inlay._native import module
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


def _backward_native(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float) -> Tensor:
    _check("rms_norm_backward", x, weight)
    check_same("rms_norm_backward", "dy", dy, "x", x, shape=True)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight = None if weight is None else weight.contiguous()
    module().rms_norm_backward(*map(as_rows, (dx, dy, x)), weight, rstd.reshape(-1), offset)
    return dx


@raw_op(native=_backward_native, fake=lambda dy, x, weight, rstd, offset: x.new_empty(x.shape))
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float) -> Tensor:
    """dy, x [..., H], rstd [...] -> dx [..., H]"""
    _check("rms_norm_backward", x, weight)
    check_same("rms_norm_backward", "dy", dy, "x", x, shape=True)
    wide = compute_dtype(x)
    t = dy.to(wide) * _scale(weight, offset, wide)
    rstd = rstd.unsqueeze(-1)
    normed = x.to(wide) * rstd
    dx = rstd * (t - normed * (t * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype).contiguous()


def _weight_grad(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """Norm weights are rarely trained, so plain torch does here."""
    terms = dy.to(rstd.dtype) * x.to(rstd.dtype) * rstd.unsqueeze(-1)
    return as_rows(terms).sum(0).to(weight.dtype)


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
        dx = rms_norm_backward(dy, x, weight, rstd, ctx.offset) if ctx.needs_input_grad[0] else None
        dweight = _weight_grad(dy, x, rstd, weight) if ctx.needs_input_grad[1] else None
        return dx, dweight, None, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """x [..., H] -> x·rstd·(offset + weight) in x's dtype; differentiable in x and weight."""
    return apply(_RMSNorm, x, weight, float(eps), float(offset))
