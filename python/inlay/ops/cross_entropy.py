"""Linear layer + softmax cross-entropy over supervised tokens, in chunks of rows: logits are never kept whole.

Per chunk of c rows: logits = h·Wᵀ into a buffer that is used again; the loss and, in place of the logits,
their gradient (softmax − onehot)·scale; d_hidden = that · W. The gradient is ready when the forward ends,
and the backward only multiplies by the incoming one, which mostly is 1.

A trained head's gradient is as large as the head. The logits of few rows take no more memory than its fp32 sum would:
then they are one chunk, and a single product writes the gradient in the weight's dtype. More rows are summed in fp32
and rounded at the end. Either way the peak is at most that sum and the gradient. In 16 bits an incoming gradient other
than 1 rounds the gradient of a single chunk once more, as torch does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from inlay._native import module
from inlay.ops._registry import (
    autocast_dtype,
    autocast_enabled,
    check_device,
    check_floating,
    check_same,
    compute_dtype,
    fail,
    in_plain_torch,
    raw_op,
    without_autocast,
    without_views,
)
from inlay.ops.matmul_sum import mm, mm_into, packs
from inlay.ops.submatrix import submatrix_grad_into_

# Rows of logits alive at a time. Measured at 1,024 x 49,152 x 576 bf16 on 2 AMX cores, forward + backward: 128 rows
# 670 ms, 256: 485, 512: 365, 1,024: 380 (the two matmuls alone: 290). Below 512 the GEMM repacks the weight too often.
DEFAULT_CHUNK = 512
# Where products are packed by ourselves, 256 rows lose nothing.
PACKED_CHUNK = 256

# Rows of the head's gradient that are scaled at a time: an fp32 copy of them stays in cache.
_SCALED = 512


# --- raw op: softmax cross-entropy of one chunk, gradient in place of the logits ---------------------------


def _check_chunk(logits: Tensor, labels: Tensor) -> None:
    op = "cross_entropy_chunk_"
    check_floating(op, "logits", logits)
    check_device(op, "labels", labels, "logits", logits)
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        got = f"{tuple(logits.shape)} with {labels.dtype} {tuple(labels.shape)}"
        fail(op, "logits, labels", "[c, V] with int64 [c]", got, "pass one label per row")


def _chunk_native(logits: Tensor, labels: Tensor, scale: float, write_grad: bool) -> Tensor:
    _check_chunk(logits, labels)
    if logits.stride(1) != 1:
        return cross_entropy_chunk_.reference(logits, labels, scale, write_grad)
    loss = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    module().cross_entropy_chunk(loss, logits.detach(), labels.contiguous(), scale, write_grad)
    return loss


def _chunk_fake(logits: Tensor, labels: Tensor, scale: float, write_grad: bool) -> Tensor:
    return logits.new_empty(labels.shape, dtype=compute_dtype(logits))


@raw_op(native=_chunk_native, fake=_chunk_fake, mutates=("logits",))
def cross_entropy_chunk_(logits: Tensor, labels: Tensor, scale: float, write_grad: bool) -> Tensor:
    """logits [c, V], labels int64 [c] in [0, V) -> loss fp32 [c]; write_grad: logits ← (softmax − onehot)·scale."""
    _check_chunk(logits, labels)
    log_probs = torch.log_softmax(logits.to(compute_dtype(logits)), dim=-1)
    picked = labels.unsqueeze(-1)
    loss = -log_probs.gather(-1, picked).squeeze(-1)
    if write_grad:
        grad = log_probs.exp_()
        grad.scatter_add_(-1, picked, torch.full_like(picked, -1, dtype=grad.dtype))
        logits.detach().copy_(grad.mul_(scale))
    return loss


# --- autograd ---------------------------------------------------------------------------------------------


class _WeightGrad:
    """dᵀ·hidden over all chunks: the one product of a single chunk, or a sum in fp32."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, chunks: int):
        self.empty = True
        fresh = torch.empty if chunks else torch.zeros
        self.sum = fresh(weight.shape, dtype=dtype, device=weight.device)

    def add(self, d_logits: Tensor, hidden: Tensor) -> None:
        if self.sum.dtype != d_logits.dtype:
            submatrix_grad_into_(self.sum, d_logits, hidden, not self.empty)
        elif self.empty:
            torch.mm(d_logits.t(), hidden, out=self.sum)
        else:
            self.sum.addmm_(d_logits.t(), hidden)
        self.empty = False


class _Sums:
    """What the chunks add up to. `weight` and `bias` are the caller's, whose dtypes the gradients have."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
        all_rows: bool,
        chunks: int,
    ):
        wide = compute_dtype(hidden)
        self.loss = hidden.new_zeros((), dtype=wide)
        fresh = torch.empty_like if all_rows else torch.zeros_like
        self.hidden = fresh(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.bias = hidden.new_zeros(weight.shape[0], dtype=wide) if needs[2] and bias is not None else None
        # fp16 is scaled at the end, and could not hold the sum before that.
        dtype = weight.dtype if chunks == 1 and weight.dtype != torch.float16 else wide
        self.weight = _WeightGrad(weight, dtype, chunks) if needs[1] else None

    def add(self, rows: Tensor | slice, chunk: Tensor, d_logits: Tensor, weight: Tensor) -> None:
        if self.hidden is not None:
            if isinstance(rows, slice):
                mm_into(self.hidden[rows], d_logits, weight)
            else:
                self.hidden.index_copy_(0, rows, mm(d_logits, weight))
        if self.weight is not None:
            self.weight.add(d_logits, chunk)
        if self.bias is not None:
            self.bias += d_logits.sum(0, dtype=self.bias.dtype)


def _chunk_size(rows: int, hidden: Tensor, weight: Tensor, chunk: int | None, trained: bool) -> int:
    """Rows of logits: as many chunks as are asked for, of nearly one size, so that no small, slow one is the last."""
    if chunk is None:
        chunk = PACKED_CHUNK if packs(hidden) else DEFAULT_CHUNK
        width, bytes_each = hidden.shape[-1], hidden.element_size()
        if trained and weight.dtype == hidden.dtype and rows <= 4 * width // bytes_each:
            chunk = max(1, rows)  # logits no larger than the fp32 sum, which one chunk does not need
        elif trained:
            chunk = max(chunk, width)  # no larger than a gradient of their dtype, which is not there yet
    count = max(1, -(-rows // chunk))
    return max(1, -(-rows // count))


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    scale: float,
    chunk: int | None,
    needs: tuple,
) -> _Sums:
    """hidden [M, H], labels [M], rows: which of the M are supervised."""
    all_rows = rows.numel() == hidden.shape[0]
    chunk = _chunk_size(rows.numel(), hidden, weight, chunk, needs[1])
    sums = _Sums(hidden, weight, bias, needs, all_rows, -(-rows.numel() // chunk))
    weight = weight.to(hidden.dtype)
    buffer = hidden.new_empty(min(chunk, rows.numel()), weight.shape[0])
    for start in range(0, rows.numel(), chunk):
        picked = slice(start, min(start + chunk, rows.numel())) if all_rows else rows[start : start + chunk]
        part = hidden[picked]
        logits = buffer[: part.shape[0]]
        mm_into(logits, part, weight.t())
        if bias is not None:
            logits += bias.to(hidden.dtype)
        sums.loss += cross_entropy_chunk_(logits, labels[picked], scale, any(needs)).sum()
        if any(needs):
            sums.add(picked, part, logits, weight)
    return sums


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad·factor in `dtype`, by way of no larger copy; `grad` itself where that is the same."""
    if grad.is_cpu and in_plain_torch((grad, factor)) and float(factor) == 1.0:  # a GPU would have to be waited for
        return grad.to(dtype)
    if grad.dtype == dtype:
        return grad * factor
    result = torch.empty_like(grad, dtype=dtype)
    for part, into in zip(grad.split(_SCALED), result.split(_SCALED)):
        into.copy_(part * factor)
    return result


class _LinearCrossEntropy(Function):
    @staticmethod
    @without_views
    @without_autocast
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: Tensor,
        num_items: Tensor | int | None,
        chunk: int | None,
        needs: tuple[bool, bool, bool],
    ) -> Tensor:
        count = rows.numel() if num_items is None else num_items
        scale = 1.0 / float(count) if float(count) else float("nan")
        # fp16 cannot hold probability/count: its gradient is scaled after the product instead.
        inner = 1.0 if hidden.dtype == torch.float16 else scale
        sums = _in_chunks(hidden, weight, bias, labels, rows, inner, chunk, needs)
        ctx.save_for_backward(sums.hidden, sums.weight.sum if sums.weight else None, sums.bias)
        ctx.outer, ctx.dtypes = scale / inner, (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        return sums.loss / count

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        factor = d_loss * ctx.outer
        grads = (
            None if grad is None else _scaled(grad, factor, dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None, None


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    op = "linear_cross_entropy"
    check_floating(op, "hidden", hidden)
    check_device(op, "labels", labels, "hidden", hidden)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype == torch.float32 and hidden.dtype in (torch.bfloat16, torch.float16):
            check_device(op, name, tensor, "hidden", hidden)
        elif tensor is not None:
            check_same(op, name, tensor, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        fail(op, "weight", f"[vocabulary, {hidden.shape[-1]}]", tuple(weight.shape), "pass the output head's weight")
    if labels.shape != hidden.shape[:-1]:
        fail(op, "labels", f"shape {tuple(hidden.shape[:-1])}", tuple(labels.shape), "one label per token")
    if labels.dtype != torch.int64:
        fail(op, "labels", "torch.int64", labels.dtype, "cast them with .long()", TypeError)


def _supervised_rows(labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    rows = torch.nonzero(labels != ignore_index).squeeze(-1)
    if rows.numel():
        low, high = (int(v) for v in torch.aminmax(labels[rows]))
        if low < 0 or high >= vocabulary:
            wanted = f"values in [0, {vocabulary}) or ignore_index {ignore_index}"
            fail("linear_cross_entropy", "labels", wanted, f"{low} to {high}", "check the tokenizer", IndexError)
    return rows


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """hidden [..., H], weight [V, H], labels int64 [...] -> fp32 scalar, mean over supervised tokens.

    weight and bias have hidden's dtype, or are fp32 beside a hidden of 16 bits: products then take them rounded to it,
    and their gradients are fp32. num_items: divide the sum by this instead (gradient accumulation). No supervised
    token: nan for the mean and 0 with num_items, as torch has it. chunk: rows of logits alive at a time.
    """
    if chunk is not None and chunk < 1:
        fail("linear_cross_entropy", "chunk", "1 or more rows", chunk, "leave it out for the default")
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    if autocast_enabled(hidden.device.type):
        dtype = autocast_dtype(hidden)
        hidden = hidden.to(dtype)  # fp32 weights are rounded further on, past autograd: their gradients stay fp32
        weight, bias = (t if t is None or t.dtype == torch.float32 else t.to(dtype) for t in (weight, bias))
    _check(hidden, weight, bias, labels)
    labels = labels.reshape(-1)
    rows = _supervised_rows(labels, ignore_index, weight.shape[0])
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, rows, num_items, chunk, needs)
