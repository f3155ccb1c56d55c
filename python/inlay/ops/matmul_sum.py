"""Σ left_i·right_i + bias in one fp32 sum with one rounding, for many rows of bf16 on a CPU.

What a layer adds up is one such sum: x·Wᵀ and a low-rank branch, x·Wᵀ and chosen channels, dq·W_q + dk·W_k + dv·W_v.
With AVX-512 BF16 pairs of bf16 are multiplied; on CPUs without such instructions, where torch emulates them at a fifth
of fp32's speed and less, operands become fp32 as they are packed, so that bf16 runs as fast as fp32 does. Elsewhere,
callers keep to torch's products, each rounded where it is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay import _native
from inlay.ops import _registry
from inlay.ops._registry import as_rows, fail, in_plain_torch, raw_op

#: The instruction set that multiplies pairs of bf16, and bytes, for this kernel.
ISA = "avx512_bf16"
#: Those that have the kernel. With AMX torch's products (oneDNN) are the faster ones.
ISAS = ("avx2", "avx512", ISA)

#: Rows from which packing the right operands pays, by benchmarks/ops/bench_matmul_sum.py.
MANY = 32
#: And from which rounding both operands to 8 bits does; likewise.
MANY_BYTES = 64


def packs(x: Tensor) -> bool:
    """True where products of ``x [..., K]`` are this kernel's: many rows of plain bf16 on a CPU of that kind."""
    if x.dtype != torch.bfloat16 or not x.is_cpu or x.numel() < MANY * x.shape[-1] or not x.shape[-1]:
        return False
    if torch.compiler.is_compiling() or not in_plain_torch((x,)) or _registry.forced() == "reference":
        return False
    return _native.available() and _native.module().isa() in ISAS


def packs_bytes(x: Tensor) -> bool:
    """True where products of ``x [..., K]`` can be those of 8 bits."""
    return packs(x) and x.numel() >= MANY_BYTES * x.shape[-1] and _native.module().isa() == ISA


def unit_stride(t: Tensor) -> Tensor:
    """``t`` or a copy of it that has neighbours in memory along a dimension."""
    return t if 1 in t.stride() or 1 in t.shape else t.contiguous()


def check_operands(op: str, out: Tensor, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> None:
    """ValueError unless every lefts[i]·rights[i] has the shape of ``out``."""
    got = [(tuple(left.shape), tuple(right.shape)) for left, right in zip(lefts, rights)]
    fit = all(a[0] == out.shape[0] and b[1] == out.shape[1] and a[1] == b[0] for a, b in got)
    if not got or len(lefts) != len(rights) or not fit:
        wanted = f"pairs of [{out.shape[0]}, K] and [K, {out.shape[1]}]"
        fail(op, "lefts, rights", wanted, f"{len(lefts)} and {len(rights)}: {got}", "match the shapes")


def _is_the_kernel_s(out: Tensor, lefts: list[Tensor], rights: list[Tensor]) -> bool:
    left, right = {t.dtype for t in lefts}, {t.dtype for t in rights}
    wide = {torch.float32}
    if out.dtype not in (torch.bfloat16, torch.float32):
        return False
    return left == right == wide or (left == {torch.bfloat16} and right <= {torch.bfloat16, torch.float32})


def _run(out: Tensor, lefts: list[Tensor], rights: list[Tensor], bias: Tensor | None, add: bool) -> None:
    if _native.module().isa() not in ISAS or not _is_the_kernel_s(out, lefts, rights):
        return matmul_sum_.reference(out, lefts, rights, bias, add)
    check_operands("matmul_sum_", out, lefts, rights)
    lefts, rights = [unit_stride(t.detach()) for t in lefts], [unit_stride(t.detach()) for t in rights]
    bias = bias if bias is None else bias.detach().to(out.dtype).contiguous()
    _native.module().matmul_sum(out.detach(), lefts, rights, bias, add)


@raw_op(native=_run, fake=lambda out, lefts, rights, bias, add: None, mutates=("out",))
def matmul_sum_(out: Tensor, lefts: list[Tensor], rights: list[Tensor], bias: Tensor | None, add: bool) -> None:
    """out [M, N] = Σ lefts[i] [M, K_i] · rights[i] [K_i, N] + bias [N], added to what is there if ``add``.

    Sums are fp32 (float64 for float64 operands) and rounded once, to out's dtype. The kernel's: lefts bf16 and
    rights bf16 or fp32, which take part with 16 bits of their 24 where bf16 is multiplied in pairs; or all fp32.
    """
    check_operands("matmul_sum_", out, lefts, rights)
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    total = sum(left.to(wide) @ right.to(wide) for left, right in zip(lefts, rights))
    for term in (bias, out if add else None):
        total = total if term is None else total + term.detach().to(wide)
    out.detach().copy_(total)


def matmul_sum(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Σ lefts[i]·rights[i] + bias as a new tensor ``[..., N]``, for lefts ``[..., K_i]``; no autograd.

    dtype: float32 or that of the lefts (the default).
    """
    rows = [as_rows(left) for left in lefts]
    out = torch.empty(rows[0].shape[0], rights[0].shape[1], dtype=dtype or rows[0].dtype, device=rows[0].device)
    matmul_sum_(out, rows, list(rights), bias, False)
    return out.view(*lefts[0].shape[:-1], out.shape[1])


def mm_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out [M, N] = left [M, K] · right [K, N] in out's memory, by this kernel or torch's."""
    if packs(left) and right.dtype == left.dtype:
        matmul_sum_(out, [left], [right], None, False)
    else:
        torch.mm(left, right, out=out)


def mm(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] · right [K, N], by this kernel or torch's."""
    return matmul_sum([left], [right]) if packs(left) and right.dtype == left.dtype else left.mm(right)
