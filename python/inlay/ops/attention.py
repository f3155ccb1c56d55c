"""Attention with grouped queries over stretches of keys: causal, padded, packed or windowed, without a mask.

  P = softmax(s)   out = P·v     s = q·kᵀ·scale, or softcap·tanh(q·kᵀ·scale/softcap)
  dS = P·(dO·vᵀ − rowsum(dO·O))·scale, with a softcap ·(1 − tanh²)   dq = dS·k   dk = dSᵀ·q   dv = Pᵀ·dO

The soft cap is Gemma 2's (arXiv:2408.00118, section 2), after Bello et al. (arXiv:1611.09940). A sink is GPT-OSS's
(arXiv:2508.10925): a learned logit per head that takes part in the softmax and has no value. Its gradient is
−Σ exp(sink − logsumexp)·rowsum(dO·O).

A token sees one stretch of keys, and its borders never fall from token to token: two numbers per token say
what a mask of T x T does, and blocks of keys that nobody sees are never touched. Keys and values are not repeated for
their groups. Kept for the backward: q, k, v, out and the scores' logsumexp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from inlay._native import available as _native_available
from inlay._native import module
from inlay.ops._registry import (
    apply,
    check_device,
    check_floating,
    check_same,
    fail,
    raw_op,
    unit_inner,
    without_autocast,
)


def _like_projection(x: Tensor) -> Tensor:
    """Empty, the shape of x [B, H, T, D], in memory [B, T, H, D]; no view, since outputs may be changed in place."""
    batch, heads, tokens, width = x.shape
    return x.new_empty_strided(x.shape, (tokens * heads * width, width, heads * width, 1))


def kernel_fits(q: Tensor) -> bool:
    """True if our own kernels would be the faster ones for ``q [B, H, T, D]``, were it on this CPU."""
    wanted = q.dtype in (torch.float32, torch.bfloat16) and q.shape[-1] <= 256 and q.numel() > 0
    return wanted and _native_available() and module().isa() != "scalar"


def has_own_kernel(q: Tensor) -> bool:
    """True where our own attention runs, and is faster than torch's."""
    return q.is_cpu and not torch.compiler.is_compiling() and kernel_fits(q)


def shares(q: Tensor, k: Tensor) -> int:
    """Into how many shares of its keys the backward of a head is cut, so that few heads keep several threads busy.

    Shapes decide, not threads, so that results do not depend on those. Each share packs the queries again and leaves a
    part of dq: a third more time for four shares of 512 keys, a tenth for two of 1,024.
    """
    heads, keys = k.shape[0] * k.shape[1], k.shape[2]
    return 1 if heads >= 16 else min(4, max(1, keys // 1024))


def _forward_native(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, sinks: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_fake(q, k, v, spans, sinks, scale, softcap)
    module().attention_forward(out, lse, *(unit_inner(t) for t in (q, k, v)), spans, sinks, scale, softcap)
    return out, lse


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, sinks: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    return _like_projection(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def mask_of(spans: Tensor | None, tokens: int, keys: int, device: torch.device) -> Tensor:
    """bool [B or 1, 1, T, S], True where a token sees a key."""
    at = torch.arange(keys, device=device)
    if spans is None:
        return (at <= torch.arange(tokens, device=device)[:, None])[None, None]
    return ((at >= spans[..., :1]) & (at < spans[..., 1:]))[:, None]


def _scores(q: Tensor, k: Tensor, spans: Tensor | None, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """fp32 or wider [B, G, H / G, T, S], -inf where a token does not see a key; and their slopes by the products."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(wide)
    mask = mask_of(spans, q.shape[2], k.shape[2], q.device)[:, :, None]
    scores, slopes = grouped @ k[:, :, None].to(wide).transpose(-1, -2) * scale, scale
    if softcap:
        bent = (scores / softcap).tanh()
        scores, slopes = bent * softcap, (1 - bent.square()) * scale
    return scores.masked_fill(~mask, -torch.inf), slopes


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    return torch.where(scores == -torch.inf, 0.0, (scores - lse.unflatten(1, scores.shape[1:3])[..., None]).exp())


@raw_op(native=_forward_native, fake=_forward_fake)
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, sinks: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k and v [B, G, S, D], spans int64 [B or 1, T, 2], sinks fp32 [H] -> out, lse fp32 [B, H, T]

    softcap 0: none.
    """
    scores, _ = _scores(q, k, spans, scale, softcap)
    lse = scores.logsumexp(-1).flatten(1, 2)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    out = _probabilities(scores, lse) @ v[:, :, None].to(scores.dtype)
    return _like_projection(q).copy_(out.flatten(1, 2)), lse.float()


def _backward_native(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    spans: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _backward_fake(do, q, k, v, o, lse, spans, scale, softcap)
    count = shares(q, k)
    parts = None if count == 1 else q.new_empty((count, *q.shape), dtype=torch.float32)
    inputs = (unit_inner(t) for t in (do, q, k, v, o))
    module().attention_backward(*grads, parts, *inputs, lse, spans, scale, softcap)
    return grads


def _backward_fake(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    spans: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_projection(q), _like_projection(k), _like_projection(v)


@raw_op(native=_backward_native, fake=_backward_fake)
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    spans: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """do, q, o [B, H, T, D], k and v [B, G, S, D], lse fp32 [B, H, T], spans int64 [B or 1, T, 2] -> dq, dk, dv"""
    scores, slopes = _scores(q, k, spans, scale, softcap)
    p = _probabilities(scores, lse)
    grad, out, queries = (t.unflatten(1, (k.shape[1], -1)).to(p.dtype) for t in (do, o, q))
    keys, values = (t[:, :, None].to(p.dtype) for t in (k, v))
    ds = p * (grad @ values.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * slopes
    dq = (ds @ keys).flatten(1, 2)
    dk, dv = ((a.transpose(-1, -2) @ b).sum(2) for a, b in ((ds, queries), (p, grad)))
    return tuple(_like_projection(t).copy_(d) for t, d in ((q, dq), (k, dk), (v, dv)))


def _sinks_native(do: Tensor, o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    dsinks = torch.empty_like(sinks)
    module().attention_sinks(dsinks, unit_inner(do), unit_inner(o), lse, sinks)
    return dsinks


def _sinks_fake(do: Tensor, o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    return torch.empty_like(sinks)


@raw_op(native=_sinks_native, fake=_sinks_fake)
def attention_sinks(do: Tensor, o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """do, o [B, H, T, D], lse fp32 [B, H, T], sinks fp32 [H] -> dsinks fp32 [H]"""
    share = torch.where(lse == -torch.inf, 0.0, (sinks[:, None] - lse).exp())
    return -(share * (do.to(sinks.dtype) * o.to(sinks.dtype)).sum(-1)).sum((0, 2))


class Attention(Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: Tensor | None,
        scale: float,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        held = None if sinks is None else sinks.to(torch.promote_types(q.dtype, torch.float32)).contiguous()
        o, lse = attention_forward(q, k, v, spans, held, scale, softcap)
        ctx.save_for_backward(q, k, v, o, lse, spans, sinks if ctx.needs_input_grad[6] else None)
        ctx.scale, ctx.softcap = scale, softcap
        return o

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        *held, sinks = ctx.saved_tensors
        wanted, grads, dsinks = ctx.needs_input_grad[:3], (None, None, None), None
        if any(wanted):
            grads = attention_backward(do, *held, ctx.scale, ctx.softcap)
        if sinks is not None:
            o, lse = held[3:5]
            dsinks = attention_sinks(do, o, lse, sinks.to(torch.promote_types(o.dtype, lse.dtype)).contiguous())
            dsinks = dsinks.to(sinks.dtype)
        return *(g if need else None for g, need in zip(grads, wanted)), None, None, None, dsinks


def _check_extras(q: Tensor, softcap: float | None, sinks: Tensor | None) -> None:
    if softcap is not None and not 0 < softcap < math.inf:
        fail("attention", "softcap", "a positive number, or None for no cap", softcap, "see the model's config")
    if sinks is None:
        return
    check_floating("attention", "sinks", sinks)
    check_device("attention", "sinks", sinks, "q", q)
    if sinks.shape != q.shape[1:2]:
        got = tuple(sinks.shape)
        fail("attention", "sinks", f"[{q.shape[1]}], one for each head of q", got, "pass one number per head")


def _check(q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None) -> None:
    op = "attention"
    check_floating(op, "q", q)
    check_same(op, "k", k, "q", q)
    check_same(op, "v", v, "k", k, shape=True)
    fits = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or not k.shape[1] or q.shape[1] % k.shape[1]:
        got = f"{tuple(q.shape)} and {tuple(k.shape)}"
        fail(op, "q, k", "[B, Hq, T, D] and [B, Hk, S, D], Hq a multiple of Hk", got, "split the heads first")
    if spans is None:
        if q.shape[2] != k.shape[2]:
            got = f"{q.shape[2]} and {k.shape[2]}"
            fail(op, "q, k", "as many queries as keys without spans", got, "pass spans")
    elif spans.dtype != torch.int64 or spans.shape not in ((1, q.shape[2], 2), (q.shape[0], q.shape[2], 2)):
        got = f"{spans.dtype} {tuple(spans.shape)}"
        fail(op, "spans", "int64 [B or 1, T, 2]", got, "pass the first key and the one past the last for each token")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    spans: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of ``q [B, Hq, T, D]`` over ``k`` and ``v [B, Hk, S, D]``, all of one float dtype -> ``[B, Hq, T, D]``.

    On a GPU this is torch's own attention, and plain torch, which forms all scores, where that has no soft cap and no
    sinks.

    Args:
        scale: of the scores, 1/sqrt(D) if None.
        spans: int64 ``[B or 1, T, 2]``, the first key that a token sees and the one past the last. Neither falls along
            T. None: causal, a token sees the keys up to its own. A token that sees none has output 0.
        softcap: scores become ``softcap * tanh(score / softcap)`` before any is masked. None: as they are.
        sinks: ``[Hq]`` of any float dtype, a logit per head that takes its share of the softmax and has no value. It is
            neither scaled nor capped.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit; spans fall or leave [0, S].
    """
    _check(q, k, v, spans)
    _check_extras(q, softcap, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    plain = softcap is None and sinks is None
    if (q.is_cpu or q.is_meta or not plain) and q.numel() and k.numel():
        return apply(Attention, q, k, v, spans, scale, float(softcap or 0.0), sinks)
    mask = None if spans is None else mask_of(spans, q.shape[2], k.shape[2], q.device)
    grouped = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
