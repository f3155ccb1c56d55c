"""Rows looked up in a table of embeddings that trains whole, with a gradient that is summed in fp32.

torch sums the gradients of equal ids in the table's own dtype, one rounding for each: of a token that occurs 700 times
in 16 bits a percent is lost (and of the one token type of a BERT, most of it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops._registry import apply, as_rows, compute_dtype, without_autocast
from ..sharding import is_sharded

#: Elements of fp32 that are held at once.
_MOST = 2**22


class _Lookup(Function):
    """``table[ids]``: keeps the ids alone; no gradient to row ``padding``."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.tokens, ctx.padding = table.shape[0], padding
        return nn.functional.embedding(ids, table)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return row_sums(dy, ids, ctx.tokens, ctx.padding), None, None


def row_sums(dy: Tensor, ids: Tensor, tokens: int, padding: int | None) -> Tensor:
    """``[tokens, H]`` in dy's dtype: the sums of ``dy [..., H]`` by ``ids [...]``, in fp32 and rounded once.

    No fp32 tensor has more rows than there are ids and one, nor is larger than 16 MiB unless 64 columns are; the same
    bits in every run. Row ``padding`` stays zero.
    """
    flat, rows = ids.reshape(-1).long(), as_rows(dy)
    count, width = flat.numel(), dy.shape[-1]
    table = dy.new_zeros(tokens, width)
    if not count:
        return table
    places, kept = (flat, tokens) if count >= tokens else (_places(flat), count)
    if padding is not None:
        places = places.masked_fill(flat == padding, kept)
    at_once = width if torch.compiler.is_compiling() else max(64, _MOST // count)
    for first in range(0, width, at_once):
        part = slice(first, first + at_once)
        sums = _summed(rows[:, part], places, kept + 1, kept).to(dy.dtype)
        if kept == tokens:
            table[:, part] = sums[:kept]
        else:  # equal ids write the same row again
            table[:, part].index_copy_(0, flat, sums.index_select(0, places))
    return table


def _summed(rows: Tensor, places: Tensor, count: int, skip: int) -> Tensor:
    """``[count, H]``: the sums of ``rows [N, H]`` by place in fp32, in the order of the rows; none at ``skip``."""
    return torch.ops.aten.embedding_dense_backward(rows.to(compute_dtype(rows)), places, count, skip, False)


def _places(flat: Tensor) -> Tensor:
    """Numbers from 0 for the different ids in ``flat [N]``, equal for equal ids: of a shape that does not depend on
    how many differ, so that it can be traced."""
    values, order = flat.sort(stable=True)
    new = torch.zeros_like(values)
    new[1:] = values[1:] != values[:-1]
    return torch.empty_like(flat).index_copy_(0, order, new.cumsum(0))


def sums_apart(module: Any, table: Tensor) -> bool:
    """Whether the gradient of ``module``'s ``table`` is to be summed here: it trains, in 16 bits, and torch would give
    it densely and as it is (not ``sparse``, no ``scale_grad_by_freq``, no ``max_norm``)."""
    return (
        torch.is_grad_enabled()
        and table.requires_grad
        and table.dtype in (torch.bfloat16, torch.float16)
        and not (module.sparse or module.scale_grad_by_freq or module.max_norm is not None)
        and not is_sharded(table)
    )


def look_up(table: Tensor, ids: Tensor, padding: int | None) -> Tensor:
    """``table[ids] [..., H]`` of ``ids [...]`` and ``table [V, H]``, differentiable in the table."""
    return apply(_Lookup, table, ids, padding)
