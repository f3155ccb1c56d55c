"""Causal attention with grouped queries: torch's flash kernel forward, our own backward where the CPU has AMX.

  P = exp(q·kᵀ·scale − lse)   dS = P·(dO·vᵀ − rowsum(dO·O))·scale   dq = dS·k   dk = dSᵀ·q   dv = Pᵀ·dO

torch's CPU flash backward takes ten times its forward at short sequences. Ours (csrc/cpu/attention.cpp) works on
bf16 tiles and skips the masked half. Keys and values are never repeated for their groups. Kept: q, k, v, o, lse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from inlay._native import available as _native_available
from inlay._native import module
from inlay.ops._registry import apply, check_floating, check_same, fail, raw_op, without_autocast


def _like_projection(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty, the shape of x [B, H, T, D], in memory [B, T, H, D]."""
    batch, heads, tokens, width = x.shape
    return x.new_empty((batch, tokens, heads, width), dtype=dtype or x.dtype).transpose(1, 2)


def _sum_groups(parts: Tensor, like: Tensor) -> Tensor:
    """[B, Hq, T, D] -> [B, Hk, T, D]: the parts of the queries that share a key head."""
    batch, groups, tokens, width = like.shape
    return parts.view(batch, groups, -1, tokens, width).sum(2)


def tiles_fit(q: Tensor) -> bool:
    """True if our own backward has tiles for ``q [B, H, T, D]``, were it on this CPU."""
    fits = q.dtype == torch.bfloat16 and q.shape[-1] % 32 == 0 and q.numel() > 0
    return fits and _native_available() and module().isa() == "amx"


def has_fast_backward(q: Tensor) -> bool:
    """True where our own backward runs, rather than torch's."""
    return q.is_cpu and not torch.compiler.is_compiling() and tiles_fit(q)


def _unit_inner(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _native(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not tiles_fit(q):
        return causal_attention_backward.reference(do, q, k, v, o, lse, scale)
    dq = _like_projection(q)
    dk, dv = (torch.empty(q.shape, dtype=torch.float32) for _ in range(2))
    inputs = (_unit_inner(t) for t in (do, q, k, v, o, lse))
    module().causal_attention_backward(dq, dk, dv, *inputs, scale)
    return dq, *(_like_projection(t).copy_(_sum_groups(d, t)) for d, t in ((dk, k), (dv, v)))


def _fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_projection(q), _like_projection(k), _like_projection(v)


@raw_op(native=_native, fake=_fake)
def causal_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """do, q, o [B, Hq, T, D], k and v [B, Hk, T, D], lse fp32 [B, Hq, T] -> dq, dk, dv"""
    repeat = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(repeat, 1) for t in (k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = flash(do, q, keys, values, o, lse, 0.0, True, scale=scale)
    if repeat > 1:
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (_sum_groups(d.to(wide).contiguous(), t) for d, t in ((dk, k), (dv, v)))
    return tuple(_like_projection(t).copy_(d) for t, d in ((q, dq), (k, dk), (v, dv)))


class CausalAttention(Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        grads = causal_attention_backward(do, *ctx.saved_tensors, ctx.scale)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    op = "causal_attention"
    check_floating(op, "q", q)
    check_same(op, "k", k, "q", q)
    check_same(op, "v", v, "k", k, shape=True)
    fits = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not fits or q.shape[1] % max(1, k.shape[1]):
        got = f"{tuple(q.shape)} and {tuple(k.shape)}"
        fail(op, "q, k", "[B, Hq, T, D] and [B, Hk, T, D], Hq a multiple of Hk", got, "split the heads first")


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """q [B, Hq, T, D], k and v [B, Hk, T, D] -> [B, Hq, T, D]; scale defaults to 1/sqrt(D).

    Elsewhere than on the CPU this is torch's own attention.
    """
    _check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.is_cpu and q.numel():
        return apply(CausalAttention, q, k, v, scale)
    grouped = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
