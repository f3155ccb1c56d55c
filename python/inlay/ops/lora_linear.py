"""LoRA on any base: y = base(x) + s·(xl·Aᵀ)·Bᵀ (Hu et al., 2021, arXiv:2106.09685), with its backward by hand.

  xa  = xl·Aᵀ              [M, r], kept: 2r bytes a token instead of a second read of xl
  dyb = s·dy·B             [M, r], computed once for both uses below
  dB  = s·dyᵀ·xa           dA = dybᵀ·xl           both summed and returned in fp32
  dx  = base dx + dyb·A    added into the base's dx, no second [M, in] tensor

xl is x, or x after dropout. A [r, in] and B [out, r] are fp32 and are used in x's dtype.
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
    compute_dtype,
    fail,
    raw_op,
    without_autocast,
    without_views,
    writable_rows,
)
from inlay.ops.base_linear import base_linear, trains
from inlay.ops.base_products import backward_input_plus, forward_plus
from inlay.ops.matmul_sum import mm
from inlay.ops.submatrix import CUBLAS_ALIGNED, processors_of, submatrix_grad
from inlay.ops.submatrix_linear import cast_for_autocast
from inlay.ops.swiglu import swiglu, swiglu_backward, swiglu_forward

#: Rows up to which a forward without gradients computes the low-rank branch in one call, in fp32: casting the factors
#: to x's dtype would cost more than the products.
FEW = 16


# --- a few rows: y = round(y + s·(x·Aᵀ)·Bᵀ) ---------------------------------------------------------------


def add_in_two_launches(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """lora_add_ by the CUDA kernels, whatever device they are emulated on."""
    rows, engine = as_rows(x), module()
    inner = torch.empty(rows.shape[0], a.shape[0], dtype=torch.float32, device=x.device)
    engine.lora_project(inner, rows, a.contiguous(), scale)
    with writable_rows(y) as target:
        engine.lora_expand(target, inner, b.contiguous())


def _lora_add_native(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    if not x.is_cpu:
        return add_in_two_launches(y, x, a, b, scale)
    if y.is_contiguous():
        return module().lora_add(as_rows(y), as_rows(x), a, b, scale)
    with writable_rows(y) as rows:
        module().lora_add(rows, as_rows(x), a, b, scale)


@raw_op(native=_lora_add_native, fake=lambda y, x, a, b, scale: None, mutates=("y",))
def lora_add_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """y [..., N] += s·(x [..., K]·Aᵀ)·Bᵀ in y's memory, A fp32 [r, K], B fp32 [N, r]: fp32 sums, one rounding."""
    acc = as_rows(x).to(a.dtype).mm(a.t()).mul_(scale).mm(b.t())
    y.detach().copy_(torch.add(acc.view(y.shape), y))


# --- the linear -------------------------------------------------------------------------------------------


def check_factors(op: str, x: Tensor, a: Tensor, b: Tensor) -> None:
    """Raise ValueError or TypeError unless A [r, in] and B [out, r] are fp32 factors for x [..., in]."""
    check_floating(op, "x", x)
    check_device(op, "A", a, "x", x)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[1] != x.shape[-1]:
        got = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
        fail(op, "A, B", f"[r, {x.shape[-1]}] and [out, r]", got, "match the factors to the base weight")
    if a.dtype != compute_dtype(x) or b.dtype != a.dtype:
        fail(op, "A, B", str(compute_dtype(x)), f"{a.dtype}, {b.dtype}", "keep trainables in fp32", TypeError)


def _forward(
    x: Tensor, xl: Tensor, a: Tensor, b: Tensor, scale: float, keep: bool, base: Any, tensors: tuple
) -> tuple[Tensor, Tensor | None]:
    """base(x) + s·(xl·Aᵀ)·Bᵀ, and xa [M, r] if a backward will want it."""
    if not keep and xl.numel() <= FEW * xl.shape[-1]:
        y = base.forward(x, *tensors)
        lora_add_(y, xl, a, b, scale)
        return y, None
    xa = mm(as_rows(xl), a.to(xl.dtype).t())
    return forward_plus(base, x, xa, (b * scale).to(xl.dtype), tensors), xa


def _few_rows(x: Tensor, a: Tensor, b: Tensor, scale: float, base: Any, tensors: tuple) -> Tensor | None:
    """Base and branch as one op, for a base that has one for these rows."""
    return base.forward_lora(x, a, b, scale, *tensors) if hasattr(base, "forward_lora") else None


# --- what the backward wants of dy ------------------------------------------------------------------------

#: What cuda/lora_backward.cu takes: factors of up to 16 columns, and a share of the tokens for every 512.
ONE_PASS_RANK, _ONE_PASS_TOKENS = 16, 512
#: Bytes of dy from which one pass pays, and the ranks: those that cuBLAS cannot load 16 bytes at a time. On an H200 one
#: pass takes 162 us at 8,192 x 14,336 and rank 16, and two products by cuBLAS 125.
ONE_PASS_BYTES = 32 << 20


def _parts(tokens: int, columns: int, processors: int) -> tuple[int, int]:
    """Chunks of the columns and shares of the tokens: as long shares as there may be, two blocks a multiprocessor.

    The parts cost 8·r/T + 8·r/C bytes an element of dy, T tokens and C columns a block, of 2 that are saved.
    """
    shares = max(1, -(-tokens // _ONE_PASS_TOKENS))
    return max(1, min(-(-2 * processors // shares), -(-columns // 64))), shares


def one_pass(dy: Tensor, xa: Tensor, sb: Tensor, processors: int) -> tuple[Tensor, Tensor]:
    """dy·sb [M, r] and dyᵀ·xa [N, r] in fp32 by the CUDA kernel, on whatever device it is emulated on."""
    (tokens, columns), rank = dy.shape, xa.shape[1]
    chunks, shares = _parts(tokens, columns, processors)
    dyb = torch.empty(chunks, tokens, rank, dtype=torch.float32, device=dy.device)
    db = torch.empty(shares, columns, rank, dtype=torch.float32, device=dy.device)
    module().lora_backward(dyb, db, *(t if t.stride(1) == 1 else t.contiguous() for t in (dy, xa, sb)))
    return dyb.sum(0), db.sum(0)


def _one_pass_native(dy: Tensor, xa: Tensor, sb: Tensor) -> tuple[Tensor, Tensor]:
    rank = xa.shape[1]
    pays = (
        dy.is_cuda and dy.dtype in (torch.bfloat16, torch.float16) and rank <= ONE_PASS_RANK and rank % CUBLAS_ALIGNED
    )
    if pays and dy.numel() * dy.element_size() >= ONE_PASS_BYTES:
        dyb, db = one_pass(dy, xa, sb, processors_of(dy.device))
        return dyb.to(dy.dtype), db
    return mm(dy, sb), submatrix_grad(dy, xa)


def _one_pass_fake(dy: Tensor, xa: Tensor, sb: Tensor) -> tuple[Tensor, Tensor]:
    rank, wide = xa.shape[1], torch.promote_types(dy.dtype, torch.float32)
    return dy.new_empty(dy.shape[0], rank), dy.new_empty(dy.shape[1], rank, dtype=wide)


@raw_op(native=_one_pass_native, fake=_one_pass_fake)
def lora_backward(dy: Tensor, xa: Tensor, sb: Tensor) -> tuple[Tensor, Tensor]:
    """dy [M, N], xa [M, r], sb [N, r] of one dtype -> dy·sb [M, r] in it, dyᵀ·xa [N, r] in fp32."""
    return dy.mm(sb), submatrix_grad.reference(dy, xa)


def branch_gradients(dy: Tensor, xa: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """dyb = s·dy·B [M, r] in dy's dtype and dB = s·dyᵀ·xa [N, r] in fp32, for dy [M, N]."""
    dyb, db = lora_backward(dy, xa, (b * scale).to(dy.dtype))
    return dyb, db.mul_(scale)


def _gradients(dy: Tensor, xl: Tensor, xa: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dA fp32 [r, in], dB fp32 [out, r] and dyb [M, r]."""
    dyb, db = branch_gradients(as_rows(dy), xa, b, scale)
    return submatrix_grad(dyb, as_rows(xl)), db, dyb


class _LoRALinear(Function):
    @staticmethod
    @without_views
    @without_autocast
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, scale: float, base: Any, *tensors: Tensor
    ) -> Tensor:
        xl, keep = x if dropped is None else dropped, any(ctx.needs_input_grad)
        y = None if keep or dropped is not None else _few_rows(x, a, b, scale, base, tensors)
        if y is not None:
            return y
        y, xa = _forward(x, xl, a, b, scale, keep, base, tensors)
        ctx.save_for_backward(xl, xa, a, b, *tensors)
        ctx.scale, ctx.base, ctx.count = scale, base, len(tensors)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xl, xa, a, b, *tensors = ctx.saved_tensors
        da, db, dyb = _gradients(dy, xl, xa, a, b, ctx.scale)
        dx = ddropped = None
        if ctx.needs_input_grad[1]:
            ddropped = mm(dyb, a.to(dyb.dtype)).view(xl.shape)
            dx = ctx.base.backward_input(dy, *tensors) if ctx.needs_input_grad[0] else None
        elif ctx.needs_input_grad[0]:
            dx = backward_input_plus(ctx.base, dy, dyb, a.to(dyb.dtype), tensors)
        return dx, ddropped, da, db, None, None, *([None] * ctx.count)


class _SwiGLULoRALinear(Function):
    """The down projection of a gated MLP: keeps gate and up, rebuilds act(gate)·up for dA."""

    @staticmethod
    @without_views
    @without_autocast
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, act: str, a: Tensor, b: Tensor, scale: float, base: Any, *tensors: Tensor
    ) -> Tensor:
        h, keep = swiglu_forward(gate, up, act), any(ctx.needs_input_grad)
        y = None if keep else _few_rows(h, a, b, scale, base, tensors)
        if y is not None:
            return y
        y, xa = _forward(h, h, a, b, scale, keep, base, tensors)
        ctx.save_for_backward(gate, up, xa, a, b, *tensors)
        ctx.act, ctx.scale, ctx.base, ctx.count = act, scale, base, len(tensors)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, xa, a, b, *tensors = ctx.saved_tensors
        h = swiglu_forward(gate, up, ctx.act)
        da, db, dyb = _gradients(dy, h, xa, a, b, ctx.scale)
        del h
        dgate = dup = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dh = backward_input_plus(ctx.base, dy, dyb, a.to(dyb.dtype), tensors)
            dgate, dup, _ = swiglu_backward(dh, gate, up, ctx.act, None)
        return dgate, dup, None, da, db, None, None, *([None] * ctx.count)


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale·(x·Aᵀ)·Bᵀ in plain torch, differentiable in all four."""
    return (y + scale * ((x.to(a.dtype) @ a.t()) @ b.t())).to(y.dtype)


def lora_linear(
    x: Tensor, a: Tensor, b: Tensor, scale: float, base: Any, *tensors: Tensor | None, dropped: Tensor | None = None
) -> Tensor:
    """base(x) + scale·(x·Aᵀ)·Bᵀ for x [..., in], A fp32 [r, in], B fp32 [out, r].

    Differentiable in x, A and B, and in what of the base trains.

    dropped: what the low-rank branch reads instead of x (x after dropout), in x's shape.
    """
    if trains(tensors):
        check_factors("lora_linear", x, a, b)
        return add_low_rank(base_linear(x, base, *tensors), x if dropped is None else dropped, a, b, scale)
    x, tensors = cast_for_autocast(x, base, tensors)
    check_factors("lora_linear", x, a, b)
    dropped = dropped if dropped is None else dropped.to(x.dtype)
    return apply(_LoRALinear, x, dropped, a, b, scale, base, *tensors)


def swiglu_lora_linear(
    gate: Tensor, up: Tensor, act: str, a: Tensor, b: Tensor, scale: float, base: Any, *tensors: Tensor | None
) -> Tensor:
    """lora_linear of act(gate)·up [..., in], which is rebuilt in the backward, never kept."""
    if trains(tensors):
        return lora_linear(swiglu(gate, up, act), a, b, scale, base, *tensors)
    gate, tensors = cast_for_autocast(gate, base, tensors)
    check_factors("lora_linear", gate, a, b)
    return apply(_SwiGLULoRALinear, gate, up.to(gate.dtype), act, a, b, scale, base, *tensors)
