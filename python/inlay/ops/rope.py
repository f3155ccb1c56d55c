"""Rotary position embedding of queries and keys, half-rotation convention (rotate_half in transformers).

  y1 = x1·cos1 − x2·sin1    y2 = x2·cos2 + x1·sin2     (1, 2: first and second half of the rotated channels)

The backward is the transposed rotation; only cos and sin are kept. If cos has R < D channels, the first R are
rotated and the rest pass through (partial rotary). Outputs look like [B, H, T, D] and lie in memory as
[B, T, H, D], as the projections left them, so that what follows attention needs no copy.
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
    check_device,
    check_floating,
    check_same,
    compute_dtype,
    fail,
    raw_op,
    unit_inner,
    without_autocast,
    without_views,
)
from inlay.ops.base_linear import trains


def _check(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_floating(op, "q", q)
    check_same(op, "k", k, "q", q)
    check_same(op, "sin", sin, "cos", cos, shape=True)
    check_device(op, "cos", cos, "q", q)
    if q.dim() != 4 or k.dim() != 4 or q.shape[::2] != k.shape[::2] or q.shape[-1] != k.shape[-1]:
        got = f"{tuple(q.shape)} and {tuple(k.shape)}"
        fail(op, "q, k", "[B, Hq, T, D] and [B, Hk, T, D]", got, "project and transpose them first")
    batch, _, tokens, width = q.shape
    if cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens:
        fail(op, "cos", f"[1 or {batch}, {tokens}, D]", tuple(cos.shape), "pass the embeddings of these positions")
    if cos.shape[2] > width or cos.shape[2] % 2:
        fail(op, "cos", f"an even number of channels up to {width}", cos.shape[2], "check the rotary dimension")


def _empty_like_projection(x: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    return torch.empty((batch, tokens, heads, width), dtype=x.dtype, device=x.device).transpose(1, 2)


def _native(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    _check("rope_rotate", q, k, cos, sin)
    out = []
    for x in (q, k):
        y = _empty_like_projection(x)
        x = x if x.stride(-1) == 1 else x.contiguous()
        module().rope_rotate(y, x, unit_inner(cos), unit_inner(sin), inverse)
        out.append(y)
    return out[0], out[1]


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return _empty_like_projection(q), _empty_like_projection(k)


@raw_op(native=_native, fake=_fake)
def rope_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """q [B, Hq, T, D], k [B, Hk, T, D], cos and sin [B or 1, T, R] -> rotated q and k; inverse: transposed."""
    _check("rope_rotate", q, k, cos, sin)
    return _rotate(q, cos, sin, inverse), _rotate(k, cos, sin, inverse)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    half = cos.shape[-1] // 2
    wide = x.to(compute_dtype(x))
    x1, x2, rest = wide.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos1, cos2 = cos.to(wide.dtype).unsqueeze(1).split(half, dim=-1) if half else (0, 0)
    sin1, sin2 = sin.to(wide.dtype).unsqueeze(1).split(half, dim=-1) if half else (0, 0)
    if inverse:
        y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
    else:
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    return _empty_like_projection(x).copy_(torch.cat((y1, y2, rest), dim=-1))


class _RoPE(Function):
    @staticmethod
    @without_views
    @without_autocast
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rope_rotate(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = rope_rotate(dq, dk, cos, sin, True)
        return dq if ctx.needs_input_grad[0] else None, dk if ctx.needs_input_grad[1] else None, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q [B, Hq, T, D] and k [B, Hk, T, D] by cos, sin [B or 1, T, R]; differentiable in all four."""
    if trains((cos, sin)):
        _check("rope", q, k, cos, sin)
        return _rotate(q, cos, sin, False), _rotate(k, cos, sin, False)
    return apply(_RoPE, q, k, cos, sin)
