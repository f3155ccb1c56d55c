"""The short causal convolution of linear attention, each channel by itself, with silu behind it or without.

  z[t, c] = bias[c] + Σ_j weight[c, j]·x[t − K + 1 + j, c]        y = silu(z) or z

Tokens lie in rows, as projections leave them and as attention takes them: torch's convolution wants channels in rows.
Math in fp32 and one rounding. Kept for the backward: x, weight, bias; z is formed again there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from inlay import _native
from inlay._native import module
from inlay.ops._registry import (
    apply,
    check_device,
    check_floating,
    check_same,
    compute_dtype,
    fail,
    forced,
    raw_op,
    unit_inner,
    without_autocast,
    without_views,
)

#: Tokens whose products are summed together for the weight's gradient, as the kernel says.
_SPAN = 64


def has_cuda_kernel(x: Tensor) -> bool:
    """True where a kernel of ours runs on the GPU that ``x`` is on."""
    wanted = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.is_cuda and wanted and forced() != "reference" and _native.available() and _native.runs_on(x)


def _shifted(x: Tensor, taps: int) -> list[Tensor]:
    """``x [B, T, C]`` as each tap sees it: taps - 1 tokens back, ..., as it is."""
    padded = functional.pad(x, (0, 0, taps - 1, 0))
    return [padded[:, j : j + x.shape[1]] for j in range(taps)]


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = compute_dtype(x)
    total = sum(weight[:, j].to(wide) * each for j, each in enumerate(_shifted(x.to(wide), weight.shape[1])))
    assert isinstance(total, Tensor)
    return total if bias is None else total + bias.to(wide)


def _forward_native(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    y = _forward_fake(x, weight, bias, silu)
    module().causal_conv1d_forward(y, unit_inner(x), weight, bias, silu)
    return y


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@raw_op(native=_forward_native, fake=_forward_fake)
def causal_conv1d_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """x [B, T, C], weight [C, K] and bias [C] of any float dtype -> y as x"""
    z = _convolved(x, weight, bias)
    return (functional.silu(z) if silu else z).to(x.dtype).contiguous()


def _backward_native(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, needs_dx: bool, needs_taps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _backward_fake(dy, x, weight, bias, silu, needs_dx, needs_taps)
    dx = grads[0] if needs_dx else None
    dweight = dbias = sums = None
    if needs_taps:
        dweight, dbias = grads[1], None if bias is None else grads[2]
        spans = x.shape[0] * -(-x.shape[1] // _SPAN)
        sums = x.new_empty((spans, (weight.shape[1] + 1) * weight.shape[0]), dtype=torch.float32)
    module().causal_conv1d_backward(dx, dweight, dbias, sums, *map(unit_inner, (dy, x)), weight, bias, silu)
    return grads


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, needs_dx: bool, needs_taps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight = x.new_empty(x.shape if needs_dx else 0), weight.new_empty(weight.shape if needs_taps else 0)
    return dx, dweight, weight.new_empty(0) if bias is None or not needs_taps else bias.new_empty(bias.shape)


@raw_op(native=_backward_native, fake=_backward_fake)
def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, needs_dx: bool, needs_taps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x [B, T, C] -> dx, dweight [C, K], dbias [C]; [0] for what is not needed."""
    dx, dweight, dbias = _backward_fake(dy, x, weight, bias, silu, needs_dx, needs_taps)
    wide, taps = compute_dtype(x), weight.shape[1]
    dz = dy.to(wide)
    if silu:
        z = _convolved(x, weight, bias)
        s = torch.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    if needs_dx:
        dx = _convolved(dz.flip(1), weight, None).flip(1).to(x.dtype).contiguous()
    if needs_taps:
        each_tap = [(dz * each).sum((0, 1)) for each in _shifted(x.to(wide), taps)]
        dweight = torch.stack(each_tap, 1).to(weight.dtype)
        dbias = dbias if bias is None else dz.sum((0, 1)).to(bias.dtype)
    return dx, dweight, dbias


class _CausalConv1d(Function):
    @staticmethod
    @without_views
    @without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.silu = silu
        return causal_conv1d_forward(x, weight, bias, silu)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        grads = causal_conv1d_backward(dy, *ctx.saved_tensors, ctx.silu, needs[0], needs[1] or needs[2])
        return *(d if need else None for d, need in zip(grads, needs, strict=False)), None


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    """``x [B, T, C]``, ``weight [C, K]``, ``bias [C]`` or None, of any float dtypes -> ``y`` as ``x``.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    op = "causal_conv1d"
    check_floating(op, "x", x)
    check_floating(op, "weight", weight)
    check_device(op, "weight", weight, "x", x)
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or not weight.shape[1]:
        got = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        fail(op, "x, weight", "[B, T, C] and [C, K]", got, "put channels last, one row of taps for each")
    if bias is not None:
        check_same(op, "bias", bias, "weight", weight)
        if bias.shape != x.shape[2:]:
            fail(op, "bias", f"shape {tuple(x.shape[2:])}", tuple(bias.shape), "pass one number per channel")
    return apply(_CausalConv1d, x, weight, bias, bool(silu))
