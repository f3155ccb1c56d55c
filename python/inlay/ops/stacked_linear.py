"""Several linears of one input, with LoRA on some of them: y_i = base_i(x) + s_i·(x·A_iᵀ)·B_iᵀ.

What they share is computed once, R = Σ r_i being the ranks together:

  xa  = x·[A_1; A_2; ...]ᵀ          [M, R], one read of x
  dyb = [s_1·dy_1·B_1, ...]         [M, R]
  dA  = dybᵀ·x                      [R, in], one read of x, fp32
  dx  = Σ dy_i·W_i + dyb·A          every product added where the sum lies, no tensor per linear and no additions

dB_i = s_i·dy_iᵀ·xa_i as for one linear (lora_linear.py). Query, key and value projections are such a stack, and gate
and up. On a GPU four-bit bases that share a format are one product (base_products.Stack): B_1, B_2, ... are then the
blocks on the diagonal of one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from inlay.ops._registry import as_rows, fail, without_autocast, without_views
from inlay.ops.base_linear import base_linear, trains
from inlay.ops.base_products import Stack, backward_input_plus, forward_plus, sums_at_once, wide_sums
from inlay.ops.lora_linear import branch_gradients, check_factors, lora_linear
from inlay.ops.matmul_sum import mm, packs
from inlay.ops.submatrix import submatrix_grad
from inlay.ops.submatrix_linear import cast_for_autocast


class Part(NamedTuple):
    """One linear of a stack.

    base, tensors: the frozen product, see base_products.py. a, b, scale: LoRA's factors, A fp32 [r, in] and
    B fp32 [out, r]; None where there is none.
    """

    base: Any
    tensors: tuple[Tensor | None, ...]
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0


def _layout(parts: Sequence[Part]) -> tuple[tuple[Any, int, float | None], ...]:
    """What of `parts` is no tensor: base, number of its tensors, scale (None without LoRA)."""
    return tuple((part.base, len(part.tensors), None if part.a is None else part.scale) for part in parts)


def _split(layout: tuple[tuple[Any, int, float | None], ...], flat: Sequence[Tensor | None]) -> Iterator[Part]:
    at = 0
    for base, count, scale in layout:
        a = b = None
        if scale is not None:
            a, b = flat[at], flat[at + 1]
            at += 2
        yield Part(base, tuple(flat[at : at + count]), a, b, 1.0 if scale is None else scale)
        at += count


def _stack_a(parts: Sequence[Part], dtype: torch.dtype) -> Tensor | None:
    factors = [part.a for part in parts if part.a is not None]
    return torch.cat(factors).to(dtype) if factors else None


def _scaled_b(part: Part, dtype: torch.dtype) -> Tensor:
    assert part.b is not None
    return (part.b * part.scale).to(dtype)


def _add_product(dx: Tensor, dy: Tensor, part: Part) -> None:
    """dx += dy·W in dx's memory."""
    if hasattr(part.base, "add_backward_input"):
        part.base.add_backward_input(dx, dy, *part.tensors)
    else:
        dx.add_(part.base.backward_input(dy, *part.tensors))


def _stack_of(parts: Sequence[Part], x: Tensor) -> Stack | None:
    """The bases as one product, where they are one."""
    base = parts[0].base
    return base.stack_of([part.base for part in parts], x) if wide_sums(x) and hasattr(base, "stack_of") else None


def _diagonal_b(parts: Sequence[Part], outs: Sequence[int], like: Tensor) -> Tensor:
    """[Σout, R]: s_i·B_i on the diagonal."""
    blocks = [
        like.new_zeros(out, 0) if part.a is None else _scaled_b(part, like.dtype)
        for part, out in zip(parts, outs, strict=True)
    ]
    return torch.block_diag(*blocks)


def _forward(x: Tensor, xa: Tensor | None, parts: Sequence[Part], apart: bool) -> list[Tensor]:
    stack = _stack_of(parts, x)
    if stack is not None:
        right = None if xa is None else _diagonal_b(parts, [part.base.rows for part in parts], xa)
        return stack.forward(x, [part.tensors for part in parts], xa, right, apart)
    ys, at = [], 0
    for part in parts:
        if part.a is None or xa is None:
            ys.append(part.base.forward(x, *part.tensors))
            continue
        r = part.a.shape[0]
        ys.append(forward_plus(part.base, x, xa[:, at : at + r], _scaled_b(part, x.dtype), part.tensors))
        at += r
    return ys


def _added_alike(parts: Sequence[Part]) -> bool:
    """True where one sum takes the products of all the bases."""
    ways = {getattr(part.base, "add_up", None) for part in parts}
    return len(ways) == 1 and None not in ways


def _backward_input(dys: Sequence[Tensor], dyb: Tensor | None, parts: Sequence[Part]) -> Tensor:
    stack = _stack_of(parts, dys[0])
    right = None if dyb is None else _stack_a(parts, dyb.dtype)
    if stack is not None:
        return stack.backward_input(dys, [part.tensors for part in parts], dyb, right)
    first = parts[0]
    if packs(dys[0]) and _added_alike(parts):
        terms = [term for part, dy in zip(parts, dys, strict=True) for term in part.base.terms(dy, *part.tensors)]
        return first.base.add_up(terms, [] if dyb is None or right is None else [(dyb, right)])
    if dyb is not None and right is not None and sums_at_once(first.base, dyb):
        dx, dyb = backward_input_plus(first.base, dys[0], dyb, right, first.tensors), None
    else:
        dx = first.base.backward_input(dys[0], *first.tensors)
    for part, dy in zip(parts[1:], dys[1:], strict=True):
        _add_product(dx, dy, part)
    if dyb is not None:
        dx.view(-1, dx.shape[-1]).addmm_(dyb, right)
    return dx


class _StackedLinear(Function):
    @staticmethod
    @without_views
    @without_autocast
    def forward(ctx: Any, x: Tensor, layout: Any, apart: bool, *flat: Tensor | None) -> tuple[Tensor, ...]:
        parts = list(_split(layout, flat))
        stacked = _stack_a(parts, x.dtype)
        xa = None if stacked is None else mm(as_rows(x), stacked.t())
        ys = _forward(x, xa, parts, apart)
        ctx.save_for_backward(None if xa is None else x, xa, *flat)
        ctx.layout, ctx.shape = layout, x.shape
        return tuple(ys)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, *flat = ctx.saved_tensors
        parts = list(_split(ctx.layout, flat))
        needs_dx = ctx.needs_input_grad[0]
        if xa is None:
            return _backward_input(dys, None, parts) if needs_dx else None, None, None, *[None] * len(flat)
        rows = [as_rows(dy) for dy in dys]
        dybs, dbs = _branch_gradients(parts, rows, xa)
        dyb = torch.cat(dybs, dim=1)
        dx = _backward_input(dys, dyb, parts) if needs_dx else None
        return dx, None, None, *_in_order(parts, submatrix_grad(dyb, as_rows(x)), dbs)


def _branch_gradients(
    parts: Sequence[Part], dys: Sequence[Tensor], xa: Tensor
) -> tuple[list[Tensor], list[Tensor | None]]:
    """dyb of the parts with LoRA, and dB of every part."""
    dybs: list[Tensor] = []
    dbs: list[Tensor | None] = []
    at = 0
    for part, dy in zip(parts, dys, strict=True):
        if part.b is None:
            dbs.append(None)
            continue
        r = part.b.shape[1]
        dyb, db = branch_gradients(dy, xa[:, at : at + r], part.b, part.scale)
        dybs.append(dyb)
        dbs.append(db)
        at += r
    return dybs, dbs


def _in_order(parts: Sequence[Part], da: Tensor, dbs: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Gradients of what `_split` takes apart, in its order."""
    at = 0
    for part, db in zip(parts, dbs, strict=True):
        if db is not None:
            r = db.shape[1]
            yield da[at : at + r]
            yield db
            at += r
        yield from [None] * len(part.tensors)


def _one(x: Tensor, part: Part) -> Tensor:
    """The output of one part, differentiable in what of its base trains, too."""
    if part.a is None or part.b is None:
        return base_linear(x, part.base, *part.tensors)
    return lora_linear(x, part.a, part.b, part.scale, part.base, *part.tensors)


def stacked_linear(x: Tensor, parts: Sequence[Part], apart: bool = False) -> tuple[Tensor, ...]:
    """The output of every part for x [..., in]; differentiable in x, the factors and what of a base trains.

    apart: keep outputs out of one memory, for callers that need one of them much longer than the others.

    Raises:
        ValueError: no part, or factors that do not fit. TypeError: factors that are not fp32.
    """
    if not parts:
        fail("stacked_linear", "parts", "one or more linears", "none", "call it with the linears of x")
    if any(trains(part.tensors) for part in parts):
        return tuple(_one(x, part) for part in parts)
    plain, cast = x, []
    for part in parts:
        x, tensors = cast_for_autocast(plain, part.base, part.tensors)
        cast.append(part._replace(tensors=tuple(tensors)))
        if part.a is not None and part.b is not None:
            check_factors("stacked_linear", x, part.a, part.b)
    flat = [t for part in cast for t in ((part.a, part.b) if part.a is not None else ()) + part.tensors]
    return _StackedLinear.apply(x, _layout(cast), apart, *flat)
