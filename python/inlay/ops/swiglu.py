"""Gated activation of Llama-like MLPs: h = act(gate) · up, keeping gate and up only.

  forward   h = round(act(gate)·up)                  math in fp32, one rounding
  backward  dgate = dh·up·act'(gate)    dup = dh·act(gate)

act "silu" is SwiGLU, "gelu_tanh" and "gelu" are GeGLU. The down projection that follows needs h[..., I] for
its submatrix gradient; h is never saved: the backward has gate and up in registers anyway and rebuilds
h[..., I] bit for bit as the forward rounded it (partial backpropagation at zero saved bytes).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from inlay._native import module
from inlay.ops._registry import (
    apply,
    as_rows,
    check_floating,
    check_indices,
    check_same,
    compute_dtype,
    fail,
    raw_op,
    without_autocast,
    without_views,
)
from inlay.ops.base_linear import base_linear, trains
from inlay.ops.base_products import wide_sums
from inlay.ops.submatrix import submatrix_gather, submatrix_grad
from inlay.ops.submatrix_linear import (
    _check as check_submatrix,
)
from inlay.ops.submatrix_linear import (
    backward_input_with_delta,
    cast_for_autocast,
    forward_with_delta,
    submatrix_linear,
    submatrix_linear_in_place,
    write_values,
)

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")  # the native kernels count them in this order


def _check(op: str, gate: Tensor, up: Tensor, act: str) -> None:
    check_floating(op, "gate", gate)
    check_same(op, "up", up, "gate", gate, shape=True)
    if act not in ACTIVATIONS:
        fail(op, "act", f"one of {', '.join(ACTIVATIONS)}", repr(act), "other activations stay with the eager block")


def _activate(gate: Tensor, act: str) -> Tensor:
    if act == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none")


def _activation_slope(gate: Tensor, act: str) -> Tensor:
    """act'(gate)"""
    if act == "silu":
        sigmoid = torch.sigmoid(gate)
        return sigmoid * (1 + gate * (1 - sigmoid))
    if act == "gelu":
        density = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(gate / math.sqrt(2))) + gate * density
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * gate * gate)
    tanh = torch.tanh(inner)
    return 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * slope


# --- raw ops --------------------------------------------------------------------------------------------


def _forward_native(gate: Tensor, up: Tensor, act: str) -> Tensor:
    _check("swiglu_forward", gate, up, act)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    module().swiglu_forward(as_rows(out), as_rows(gate), as_rows(up), ACTIVATIONS.index(act))
    return out


@raw_op(native=_forward_native, fake=lambda gate, up, act: gate.new_empty(gate.shape))
def swiglu_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """gate, up [..., K] -> act(gate)·up [..., K]"""
    _check("swiglu_forward", gate, up, act)
    wide = compute_dtype(gate)
    return (_activate(gate.to(wide), act) * up.to(wide)).to(gate.dtype).contiguous()


def _empty_pair(gate: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dup: on a GPU as neighbouring columns of one matrix, so that what follows can be one product."""
    if not wide_sums(gate):
        return gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    return gate.new_empty(*gate.shape[:-1], 2, gate.shape[-1]).unbind(-2)


def _backward_native(
    dh: Tensor, gate: Tensor, up: Tensor, act: str, indices: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check("swiglu_backward", gate, up, act)
    check_same("swiglu_backward", "dh", dh, "gate", gate, shape=True)
    if indices is None:
        indices = torch.empty(0, dtype=torch.int64, device=gate.device)
    check_indices("swiglu_backward", indices, gate)
    dgate, dup = _empty_pair(gate)
    h_sel = gate.new_empty((*gate.shape[:-1], indices.numel()))
    module().swiglu_backward(
        *map(as_rows, (dgate, dup, h_sel, dh, gate, up)), indices.contiguous(), ACTIVATIONS.index(act)
    )
    return dgate, dup, h_sel


def _backward_fake(
    dh: Tensor, gate: Tensor, up: Tensor, act: str, indices: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = 0 if indices is None else indices.shape[0]
    return *_empty_pair(gate), gate.new_empty((*gate.shape[:-1], chosen))


@raw_op(native=_backward_native, fake=_backward_fake)
def swiglu_backward(
    dh: Tensor, gate: Tensor, up: Tensor, act: str, indices: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, gate, up [..., K] -> dgate, dup [..., K] and h[..., indices] (no indices: width 0)."""
    _check("swiglu_backward", gate, up, act)
    check_same("swiglu_backward", "dh", dh, "gate", gate, shape=True)
    wide = compute_dtype(gate)
    dh_wide, gate_wide, up_wide = dh.to(wide), gate.to(wide), up.to(wide)
    dgate, dup = _empty_pair(gate)
    dgate.copy_(dh_wide * up_wide * _activation_slope(gate_wide, act))
    dup.copy_(dh_wide * _activate(gate_wide, act))
    if indices is None:
        return dgate, dup, gate.new_empty((*gate.shape[:-1], 0))
    check_indices("swiglu_backward", indices, gate)
    # Of the whole h: torch's vector and tail code differ in the last bit, so gathered inputs would too.
    return dgate, dup, swiglu_forward.reference(gate, up, act).index_select(-1, indices)


# --- autograd -------------------------------------------------------------------------------------------


class _SwiGLU(Function):
    @staticmethod
    @without_views
    @without_autocast
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return swiglu_forward(gate, up, act)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        dgate, dup, _ = swiglu_backward(dh, *ctx.saved_tensors, ctx.act, None)
        needs = ctx.needs_input_grad
        return dgate if needs[0] else None, dup if needs[1] else None, None


class _SwiGLULinear(Function):
    """The down projection of act(gate)·up, with or without a submatrix delta on its input channels."""

    @staticmethod
    @without_views
    @without_autocast
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        values: Tensor | None,
        indices: Tensor | None,
        act: str,
        base: Any,
        in_place: bool,
        *base_tensors: Tensor,
    ) -> Tensor:
        h = swiglu_forward(gate, up, act)
        additive = values is not None and indices is not None and not in_place
        if values is not None and indices is not None and not in_place:
            y, _ = forward_with_delta(h, values, indices, "in", base, base_tensors)
        else:
            y = base.forward(h, *base_tensors)
        needs_h = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        ctx.save_for_backward(
            gate, up, indices, values if additive and needs_h else None, *(base_tensors if needs_h else ())
        )
        ctx.act, ctx.base, ctx.additive, ctx.base_count = act, base, additive, len(base_tensors)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, indices, values, *base_tensors = ctx.saved_tensors
        needs_gate, needs_up, needs_values = ctx.needs_input_grad[:3]
        dgate = dup = dv = h_sel = None
        if needs_gate or needs_up:
            if ctx.additive:
                dh = backward_input_with_delta(dy, dy, values, indices, "in", ctx.base, tuple(base_tensors))
            else:
                dh = ctx.base.backward_input(dy, *base_tensors)
            dgate, dup, h_sel = swiglu_backward(dh, gate, up, ctx.act, indices if needs_values else None)
        elif needs_values:  # the earliest trained layer: nothing flows further down
            chosen = (submatrix_gather(t, indices, t.dtype) for t in (gate, up))
            h_sel = swiglu_forward(*chosen, ctx.act)
        if needs_values:
            dv = submatrix_grad(dy, h_sel)
        return dgate if needs_gate else None, dup if needs_up else None, dv, *([None] * (4 + ctx.base_count))


def swiglu(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """act(gate)·up [..., K]; saves gate and up."""
    return apply(_SwiGLU, gate, up, act)


def swiglu_linear(gate: Tensor, up: Tensor, act: str, base: Any, *base_tensors: Tensor | None) -> Tensor:
    """base(act(gate)·up), differentiable in gate and up, and in what of the base trains; saves gate and up only."""
    if trains(base_tensors):
        return base_linear(swiglu(gate, up, act), base, *base_tensors)
    gate, up, base_tensors = _cast_for_autocast(gate, up, base, base_tensors)
    _check("swiglu_linear", gate, up, act)
    return apply(_SwiGLULinear, gate, up, None, None, act, base, False, *base_tensors)


def swiglu_submatrix_linear(
    gate: Tensor,
    up: Tensor,
    act: str,
    values: Tensor,
    indices: Tensor,
    base: Any,
    *base_tensors: Tensor | None,
    in_place: bool = False,
) -> Tensor:
    """base(h) + h[..., indices]·valuesᵀ for h = act(gate)·up; values fp32 [out, s]; h is rebuilt, never saved.

    in_place=True: `values` hold the chosen input channels themselves and are copied into the weight first.
    """
    if trains(base_tensors):
        linear = submatrix_linear_in_place if in_place else submatrix_linear
        return linear(swiglu(gate, up, act), values, indices, "in", base, *base_tensors)
    _check("swiglu_submatrix_linear", gate, up, act)
    check_submatrix("swiglu_submatrix_linear", gate, values, indices, "in")
    if in_place:
        write_values(values, indices, "in", base, base_tensors)
    gate, up, base_tensors = _cast_for_autocast(gate, up, base, base_tensors)
    return apply(_SwiGLULinear, gate, up, values, indices, act, base, in_place, *base_tensors)


def _cast_for_autocast(gate: Tensor, up: Tensor, base: Any, base_tensors: tuple) -> tuple[Tensor, Tensor, tuple]:
    gate, cast_tensors = cast_for_autocast(gate, base, base_tensors)
    return gate, up.to(gate.dtype), cast_tensors
