"""Dense frozen products in 8 bits, forward and input gradient: a scale per token and a scale per channel, exact sums.

    y ≈ Σ_k a·b · s·t     a = round(xH/s), s = max|xH|/127 of a token     b = round(HW/t), t of an output channel
    dx likewise, of dy per token and W per input channel

H turns each 64 neighbours along the contraction by the Hadamard matrix over 8, its own inverse: the exact product stays
the same, and an outlier is spread over its neighbours instead of taking their 8 bits (on SmolLM2 the loss on general
text stays within 0.1%, where it rose by 1%). Both operands are turned and rounded at each call, so nothing is stored.
Gradients of weights, low-rank branches and chosen channels stay in bf16 and fp32.

Source: the forward and input-gradient products of SwitchBack (Wortsman et al., 2023, arXiv:2304.13013), there with a
scale per tensor for W, here per channel as in LLM.int8() (arXiv:2208.07339); turned as in QuaRot (arXiv:2404.00456).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from inlay import _native
from inlay.ops._registry import as_rows, raw_op
from inlay.ops.base_products import DenseBase, DenseBaseT, Terms, add_narrow
from inlay.ops.matmul_sum import ISA, check_operands, packs_bytes, unit_stride

#: Largest magnitude of a row or column from which it is scaled: the inverse of a smaller scale would not be finite.
LEAST_SCALED = 2.0**-119
#: Neighbours that are turned together.
TURNED = 64


def turned(t: Tensor) -> Tensor:
    """Rows of ``t`` [rows, K] with each 64 neighbours multiplied by the Hadamard matrix / 8; fp32 [rows, ⌈K/64⌉·64]."""
    blocks = -(-t.shape[1] // TURNED)
    x = torch.nn.functional.pad(t.to(torch.float32), (0, blocks * TURNED - t.shape[1]))
    apart = TURNED // 2
    while apart:  # butterflies, in the order of the kernel's
        below, above = x.reshape(-1, 2, apart).unbind(1)
        x = torch.stack([below + above, below - above], 1)
        apart //= 2
    return x.reshape(t.shape[0], blocks * TURNED) / 8


def _eighths(t: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``t``, turned, as whole numbers in ±127 (float64), and their scales."""
    t = turned(t)
    largest = t.abs().amax(1, keepdim=True)
    scale = torch.where(largest < LEAST_SCALED, torch.ones_like(largest), largest / 127)
    return (t * (1 / scale)).round().to(torch.float64), scale


def _run(out: Tensor, lefts: list[Tensor], rights: list[Tensor], bias: Tensor | None, add: bool) -> None:
    if _native.module().isa() != ISA or not all(t.dtype == torch.bfloat16 for t in (*lefts, *rights)):
        return int8_matmul_sum_.reference(out, lefts, rights, bias, add)
    check_operands("int8_matmul_sum_", out, lefts, rights)
    rows, rights = [as_rows(t.detach()) for t in lefts], [unit_stride(t.detach()) for t in rights]
    bias = bias if bias is None else bias.detach().to(out.dtype).contiguous()
    _native.module().int8_matmul_sum(out.detach(), rows, rights, bias, add)


@raw_op(native=_run, fake=lambda out, lefts, rights, bias, add: None, mutates=("out",))
def int8_matmul_sum_(out: Tensor, lefts: list[Tensor], rights: list[Tensor], bias: Tensor | None, add: bool) -> None:
    """matmul_sum_ with every left operand in 8 bits per row, every right one in 8 bits per column; all bf16."""
    check_operands("int8_matmul_sum_", out, lefts, rights)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for left, right in zip(lefts, rights):
        (a, s), (b, t) = _eighths(left.detach()), _eighths(right.detach().t())
        total += (a @ b.t()).to(torch.float32) * (s * t.t())
    for term in (bias, out if add else None):
        total = total if term is None else total + term.detach().to(torch.float32)
    out.detach().copy_(total)


def int8_matmul_sum(lefts: Sequence[Tensor], rights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """Σ lefts[i]·rights[i] + bias as a new tensor ``[..., N]`` of the lefts' dtype, by :func:`int8_matmul_sum_`."""
    rows = [as_rows(left) for left in lefts]
    out = torch.empty(rows[0].shape[0], rights[0].shape[1], dtype=rows[0].dtype, device=rows[0].device)
    int8_matmul_sum_(out, rows, list(rights), bias, False)
    return out.view(*lefts[0].shape[:-1], out.shape[1])


class _InEightBits:
    """Products in 8 bits where they are packed (many rows of bf16), those of ``dense`` elsewhere."""

    dense: ClassVar[Any]  # also what computes where the weight trains

    @classmethod
    def forward(cls, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not packs_bytes(x):
            return cls.dense.forward(x, weight, bias)
        return int8_matmul_sum([x], [cls.dense.out_in(weight).t()], bias)

    @classmethod
    def backward_input(cls, dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not packs_bytes(dy):
            return cls.dense.backward_input(dy, weight)
        return int8_matmul_sum([dy], [cls.dense.out_in(weight)])

    @classmethod
    def forward_plus(cls, x: Tensor, left: Tensor, right: Tensor, *tensors: Tensor | None) -> Tensor:
        return add_narrow(cls.forward(x, *tensors), left, right.t())

    @classmethod
    def backward_input_plus(cls, dy: Tensor, left: Tensor, right: Tensor, *tensors: Tensor | None) -> Tensor:
        return add_narrow(cls.backward_input(dy, *tensors), left, right)

    @staticmethod
    def add_up(terms: Terms, narrow: Terms) -> Tensor:
        dx = int8_matmul_sum(*zip(*terms, strict=True))
        for left, right in narrow:
            add_narrow(dx, left, right)
        return dx


class Int8Products(_InEightBits, DenseBase):
    """nn.Linear in 8 bits."""

    dense = DenseBase


class Int8ProductsT(_InEightBits, DenseBaseT):
    """transformers' Conv1D in 8 bits."""

    dense = DenseBaseT
