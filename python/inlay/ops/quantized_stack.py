"""Products of many rows with four-bit weights, several of one input at a time and a narrow product along with them.

  panel  [ΣN, K + r]   the weights dequantized below each other, in one launch; `right` in the columns behind them
  y  = [x | left]·[W | right]ᵀ + bias       dx = [dy | left]·[W; right]

left·right is LoRA's branch, or the chosen channels of S²FT. Its r columns or rows ride in the contraction: K + r terms
of one fp32 sum. That takes x beside left in one matrix, a copy of 4·M·K bytes, and saves reading and writing y once
more, 4·M·N bytes: it is done where N > K (gate and up forward, down backward). Elsewhere the narrow product comes first
and the wide one is summed onto it (base_products.py); either way there is one rounding. Producers that leave room
beside x would save the copy, too: 1% of gate and up at 8B shapes, for a convention that every view of x had to know.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from inlay._native import module
from inlay.ops._registry import as_rows, fail, in_plain_torch, raw_op
from inlay.ops.base_products import product_onto
from inlay.ops.matmul_sum import packs
from inlay.ops.quantize_blockwise import check_packed, dequantize_4bit_, dynamic_map, levels
from inlay.ops.quantized_linear import workspace

# --- one launch -----------------------------------------------------------------------------------------------------


def _native(
    out: Tensor,
    packed: list[Tensor],
    absmaxes: list[Tensor],
    codes: list[Tensor],
    offsets: list[Tensor],
    quant_type: str,
    blocksize: int,
) -> None:
    table = dynamic_map(out.device) if codes else None
    flat = [t.reshape(-1) for t in packed]
    module().dequantize_4bit_stack(
        out, flat, levels(quant_type, out.device), absmaxes, codes, table, offsets, blocksize
    )


@raw_op(native=_native, fake=lambda *args: None, mutates=("out",))
def dequantize_4bit_stack_(
    out: Tensor,
    packed: list[Tensor],
    absmaxes: list[Tensor],
    codes: list[Tensor],
    offsets: list[Tensor],
    quant_type: str,
    blocksize: int,
) -> None:
    """Write packed weights [N_i, K], K >= 2, below each other into out [ΣN, K] float.

    codes and offsets: of double quantization, one each, or both empty.
    """
    row, columns = 0, out.shape[1]
    for i, bytes_of in enumerate(packed):
        count = 2 * bytes_of.numel() // columns
        nested = (codes[i], offsets[i]) if codes else (None, None)
        part = out[row : row + count]
        dequantize_4bit_(part, bytes_of, absmaxes[i], *nested, quant_type, blocksize, columns, 0, 0)
        row += count


# --- products -------------------------------------------------------------------------------------------------------


class PackedStack(NamedTuple):
    """Weights [rows_i, columns] of one storage format; codes and offsets are empty without double quantization."""

    packed: list[Tensor]
    absmaxes: list[Tensor]
    codes: list[Tensor]
    offsets: list[Tensor]
    rows: list[int]
    columns: int
    quant_type: str
    blocksize: int

    def check(self, op: str) -> None:
        """ValueError unless every tensor has the size that its shape and blocksize call for."""
        if self.columns < 2:
            fail(op, "packed", "2 columns or more", self.columns, "use quantized_linear")
        for i, rows in enumerate(self.rows):
            codes, offset = (self.codes[i], self.offsets[i]) if self.codes else (None, None)
            check_packed(op, self.packed[i], self.absmaxes[i], codes, offset, self.blocksize, rows, self.columns)

    def dequantize(self, like: Tensor, beside: int = 0, below: int = 0) -> Tensor:
        """[ΣN + below, columns + beside] in the reused workspace, what is beside and below not yet written."""
        rows = sum(self.rows)
        apart = self.columns + -(-beside // 64) * 64  # rows begin on 128 bytes of 16-bit numbers
        panel = workspace((rows + below) * apart, like).view(rows + below, apart)[:, : self.columns + beside]
        lists = (self.packed, self.absmaxes, self.codes, self.offsets)
        dequantize_4bit_stack_(panel[:rows, : self.columns], *lists, self.quant_type, self.blocksize)
        return panel


def _eights(rank: int) -> int:
    """Contractions of a multiple of eight keep 16-byte loads."""
    return -(-rank // 8) * 8


def _rides_along(x: Tensor, width: int, out: int) -> bool:
    """True where a copy of x beside the narrow operand costs less than reading and writing the output once more.

    Products that are packed by ourselves take both operands where they lie, in one sum.
    """
    return out > width and not packs(x)


def _beside(x: Tensor, left: Tensor, width: int) -> Tensor:
    """[x | left | zeros], `width` columns behind x."""
    both = x.new_empty(x.shape[0], x.shape[1] + width)
    both[:, : x.shape[1]] = x
    _fill(both[:, x.shape[1] :], left)
    return both


def _fill(margin: Tensor, values: Tensor) -> None:
    """The first columns are `values`, the rest zeros: what lay there before may be NaN."""
    margin[:, : values.shape[1]] = values
    margin[:, values.shape[1] :] = 0


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, end) of each of the neighbours."""
    ends = list(itertools.accumulate(sizes))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _product(x: Tensor, panel: Tensor, bias: Tensor | None, left: Tensor | None, right: Tensor | None) -> Tensor:
    if left is None or right is None:
        return functional.linear(x, panel, bias)
    return product_onto(left, right.t(), x, panel.t(), bias)


def _one_bias(biases: Sequence[Tensor | None], rows: Sequence[int], like: Tensor) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat([like.new_zeros(n) if b is None else b.to(like.dtype) for b, n in zip(biases, rows, strict=True)])


def stack_forward(
    x: Tensor,
    weights: PackedStack,
    biases: Sequence[Tensor | None],
    left: Tensor | None = None,
    right: Tensor | None = None,
    apart: bool = False,
) -> list[Tensor]:
    """x·W_iᵀ + left·right_iᵀ + bias_i, [..., N_i] each, for x [..., columns], left [M, r], right [ΣN, r]; no autograd.

    apart: outputs in memory of their own. Otherwise they are columns of one matrix, which any of them keeps alive.
    """
    weights.check("stack_forward")
    flat, bias = as_rows(x.detach()), _one_bias(biases, weights.rows, x)
    if left is not None and right is not None and _rides_along(flat, weights.columns, sum(weights.rows)):
        width = _eights(left.shape[1])
        panel = weights.dequantize(flat, beside=width)
        _fill(panel[:, weights.columns :], right)
        flat, left, right = _beside(flat, left, width), None, None
    else:
        panel = weights.dequantize(flat)
    spans = _spans(weights.rows)
    if apart:
        ys = [
            _product(flat, panel[a:b], None if bias is None else bias[a:b], left, None if right is None else right[a:b])
            for a, b in spans
        ]
    else:
        y = _product(flat, panel, bias, left, right)
        ys = [y[:, a:b] for a, b in spans]
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]


def side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """[M, ΣN] over [M, N_i] that are neighbouring columns of one matrix, as swiglu_backward leaves them; or None.

    None also while tracing, where nothing is known of where tensors lie.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if torch.compiler.is_compiling() or not in_plain_torch(parts):
        return None
    memory, stride, at = first.untyped_storage().data_ptr(), first.stride(0), first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != memory or part.storage_offset() != at or part.stride() != (stride, 1):
            return None
        at += part.shape[1]
    width = at - first.storage_offset()
    return first.as_strided((first.shape[0], width), (stride, 1)) if width <= stride else None


def stack_backward_input(
    dys: Sequence[Tensor], weights: PackedStack, left: Tensor | None = None, right: Tensor | None = None
) -> Tensor:
    """Σ dy_i·W_i + left·right, [..., columns], for dy_i [..., N_i], left [M, r], right [r, columns]; no autograd."""
    weights.check("stack_backward_input")
    rows = [as_rows(dy.detach()) for dy in dys]
    together, total = side_by_side(rows), sum(weights.rows)
    rides = together is not None and _rides_along(together, total, weights.columns)
    if rides and together is not None and left is not None and right is not None:
        width = _eights(left.shape[1])
        panel = weights.dequantize(together, below=width)
        _fill(panel[total:].t(), right.t())
        dx = _beside(together, left, width).mm(panel)
    elif together is not None:
        panel = weights.dequantize(together)
        dx = together.mm(panel) if left is None or right is None else product_onto(left, right, together, panel)
    else:
        panel = weights.dequantize(rows[0])
        dx = None if left is None or right is None else left.mm(right)
        for dy, (a, b) in zip(rows, _spans(weights.rows), strict=True):
            dx = dy.mm(panel[a:b]) if dx is None else dx.addmm_(dy, panel[a:b])
    return dx.view(*dys[0].shape[:-1], weights.columns)
