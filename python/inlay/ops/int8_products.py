"""Dense frozen products in 8 bits, forward and input gradient: a scale per token and a scale per channel, exact sums.

    y ≈ Σ_k a·b · s·t     a = round(x/s), s = max|x|/127 of a token     b = round(W/t), t of an output channel
    dx likewise, of dy per token and W per input channel

Both operands are rounded at each call, so nothing is stored. Gradients of weights, low-rank branches and chosen
channels stay in bf16 and fp32.

Source: the forward and input-gradient products of SwitchBack (Wortsman et al., 2023, arXiv:2304.13013), there with a
scale per tensor for W, here per channel, as in LLM.int8() (arXiv:2208.07339) without its outliers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay import _native
from inlay.ops._registry import as_rows, raw_op
from inlay.ops.base_products import DenseBase, DenseBaseT, Terms, add_narrow
from inlay.ops.matmul_sum import ISA, check_operands, packs, unit_stride


def _eighths(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``t`` as whole numbers in ±127 (float64) and the scales, per what is left of it along ``dim``."""
    scale = t.to(torch.float32).abs().amax(dim, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (t.to(torch.float32) * (1 / scale)).round().to(torch.float64), scale


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
        (a, s), (b, t) = _eighths(left.detach(), 1), _eighths(right.detach(), 0)
        total += (a @ b).to(torch.float32) * (s * t)
    for term in (bias, out if add else None):
        total = total if term is None else total + term.detach().to(torch.float32)
    out.detach().copy_(total)


def int8_matmul_sum(lefts: Sequence[Tensor], rights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """Σ lefts[i]·rights[i] + bias as a new tensor ``[..., N]`` of the lefts' dtype, by :func:`int8_matmul_sum_`."""
    rows = [as_rows(left) for left in lefts]
    out = torch.empty(rows[0].shape[0], rights[0].shape[1], dtype=rows[0].dtype, device=rows[0].device)
    int8_matmul_sum_(out, rows, list(rights), bias, False)
    return out.view(*lefts[0].shape[:-1], out.shape[1])


class Int8Products(DenseBase):
    """nn.Linear in 8 bits where products are packed (many rows of bf16), :class:`DenseBase` elsewhere."""

    #: What computes where the weight trains.
    dense = DenseBase

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return int8_matmul_sum([x], [weight.t()], bias) if packs(x) else DenseBase.forward(x, weight, bias)

    @staticmethod
    def backward_input(dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return int8_matmul_sum([dy], [weight]) if packs(dy) else DenseBase.backward_input(dy, weight)

    @staticmethod
    def forward_plus(x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return add_narrow(Int8Products.forward(x, weight, bias), left, right.t())

    @staticmethod
    def backward_input_plus(
        dy: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return add_narrow(Int8Products.backward_input(dy, weight), left, right)

    @staticmethod
    def add_up(terms: Terms, narrow: Terms) -> Tensor:
        dx = int8_matmul_sum(*zip(*terms, strict=True))
        for left, right in narrow:
            add_narrow(dx, left, right)
        return dx


class Int8ProductsT(DenseBaseT):
    """transformers' Conv1D likewise."""

    dense = DenseBaseT

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return int8_matmul_sum([x], [weight], bias) if packs(x) else DenseBaseT.forward(x, weight, bias)

    @staticmethod
    def backward_input(dy: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return int8_matmul_sum([dy], [weight.t()]) if packs(dy) else DenseBaseT.backward_input(dy, weight)

    @staticmethod
    def forward_plus(x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return add_narrow(Int8ProductsT.forward(x, weight, bias), left, right.t())

    @staticmethod
    def backward_input_plus(
        dy: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return add_narrow(Int8ProductsT.backward_input(dy, weight), left, right)

    add_up = staticmethod(Int8Products.add_up)
