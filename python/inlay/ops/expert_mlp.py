"""The two products of a mixture's experts with what trains beside them, and their backwards by hand.

  up     gu[m]  = x[token m]·Wu[e] + b                          keeps x, and inner activations of rank r
  down   out[t] = Σ_k w[t, k]·(h·Wd[e] + b) of its rows          keeps gu: h = act(gate)·up is rebuilt

Nothing of the width of the residual stream is kept for the rows of a token, of which there are k: with dh' = dout·Wdᵀ,
unweighted, dh = w·dh' and dw = dh'·h, so that the down projection's output is needed by no gradient. A weight, a bias
or a term has a gradient only where one is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from inlay.ops._registry import apply, compute_dtype, without_autocast
from inlay.ops.expert_gate import Gate
from inlay.ops.expert_linear import RowPlan, expert_combine, expert_grad, expert_matmul, expert_matmul_


class Term(Protocol):
    """What is added to a product: ``inner(left)·right[e]``, of few columns."""

    @property
    def fine(self) -> bool:
        """Whether :meth:`right` takes part with 16 bits of its 24."""

    @property
    def slots(self) -> Tensor:
        """int64 ``[E]``: where an expert's matrix is, -1 where it has none."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that train, then those that do not."""

    def of(self, *tensors: Tensor) -> Term:
        """The same of other tensors: those that autograd has kept."""

    def inner(self, left: Tensor, plan: RowPlan, gather: bool) -> Tensor:
        """``[R, r]`` in left's dtype."""

    def right(self) -> Tensor:
        """``[n, r, out]``"""

    def back(self, dy: Tensor, plan: RowPlan, gather: bool) -> Tensor:
        """The gradient of what :meth:`into` reads, fp32 ``[R, r]``."""

    def into(self) -> Tensor | None:
        """``[n, r, in]``, by which that enters the gradient of left as a product; None where it is scattered."""

    def scatter(self, dleft: Tensor, dinner: Tensor, plan: RowPlan) -> None:
        """Add to the gradient of left, in place, what no product does."""

    def grads(
        self, dy: Tensor, left: Tensor, inner: Tensor, dinner: Tensor, plan: RowPlan, gather: str
    ) -> tuple[Tensor, ...]:
        """Of what trains; gather: which of dy ("dy") and left ("left") has a row per token."""


@dataclass(frozen=True)
class LowRank:
    """``s·(left·A[e]ᵀ)·B[e]ᵀ``, A fp32 ``[n, r, in]``, B fp32 ``[n, out, r]``."""

    a: Tensor
    b: Tensor
    slots: Tensor
    scale: float
    fine = False

    def tensors(self) -> tuple[Tensor, ...]:
        return self.a, self.b, self.slots

    def of(self, *tensors: Tensor) -> LowRank:
        a, b, slots = tensors
        return LowRank(a, b, slots, self.scale)

    def inner(self, left: Tensor, plan: RowPlan, gather: bool) -> Tensor:
        wide = expert_matmul(left, self.a.transpose(1, 2), plan, self.slots, gather, compute_dtype(left))
        return wide.mul_(self.scale).to(left.dtype)

    def right(self) -> Tensor:
        return self.b.transpose(1, 2)

    def back(self, dy: Tensor, plan: RowPlan, gather: bool) -> Tensor:
        return expert_matmul(dy, self.b, plan, self.slots, gather, compute_dtype(dy)).mul_(self.scale)

    def into(self) -> Tensor:
        return self.a

    def scatter(self, dleft: Tensor, dinner: Tensor, plan: RowPlan) -> None:
        """Nothing: its product is all."""

    def grads(
        self, dy: Tensor, left: Tensor, inner: Tensor, dinner: Tensor, plan: RowPlan, gather: str
    ) -> tuple[Tensor, ...]:
        da = expert_grad(self.a, dinner.to(left.dtype), left, plan, self.slots, "right" if gather == "left" else "")
        db = expert_grad(self.b, dy, inner.to(dy.dtype), plan, self.slots, "left" if gather == "dy" else "")
        return da, db


@dataclass(frozen=True)
class Channels:
    """``left[:, I[e]]·V[e]ᵀ``, V fp32 ``[n, out, s]``, I int64 ``[n, s]``: chosen input channels of each expert."""

    values: Tensor
    indices: Tensor
    slots: Tensor
    fine = True

    def tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.indices, self.slots

    def of(self, *tensors: Tensor) -> Channels:
        values, indices, slots = tensors
        return Channels(values, indices, slots)

    def _places(self, plan: RowPlan) -> tuple[Tensor, Tensor]:
        slot = self.slots[plan.expert_of_row()]
        return self.indices[slot.clamp(min=0)], slot

    def inner(self, left: Tensor, plan: RowPlan, gather: bool) -> Tensor:
        rows = left.index_select(0, plan.rows) if gather else left
        return rows.gather(1, self._places(plan)[0])

    def right(self) -> Tensor:
        return self.values.transpose(1, 2)

    def back(self, dy: Tensor, plan: RowPlan, gather: bool) -> Tensor:
        return expert_matmul(dy, self.values, plan, self.slots, gather, compute_dtype(dy))

    def into(self) -> None:
        return None

    def scatter(self, dleft: Tensor, dinner: Tensor, plan: RowPlan) -> None:
        places, _ = self._places(plan)  # rows of experts that are not chosen have a gradient of zero
        summed = dleft.gather(1, places).to(dinner.dtype) + dinner
        dleft.scatter_(1, places, summed.to(dleft.dtype))

    def grads(
        self, dy: Tensor, left: Tensor, inner: Tensor, dinner: Tensor, plan: RowPlan, gather: str
    ) -> tuple[Tensor, ...]:
        return (expert_grad(self.values, dy, inner.to(dy.dtype), plan, self.slots, "left" if gather == "dy" else ""),)


# --- products with terms ----------------------------------------------------------------------------------


def _product(
    left: Tensor, gather: bool, plan: RowPlan, right: Tensor, bias: Tensor | None, narrow: Sequence[tuple]
) -> Tensor:
    """``left·right[e] + bias[e] + Σ inner·matrix``, narrow: (inner, matrix, slots, fine); the first is in the sum."""
    out = left.new_empty(plan.rows.shape[0], right.shape[2])
    rows = plan.rows if gather else None
    lefts, rights, slots = [left], [right], [plan.all]
    fine = bool(narrow) and narrow[0][3]
    for inner, matrix, held, _ in narrow[:1]:
        lefts, rights, slots = [left, inner.to(left.dtype)], [right, matrix], [plan.all, held]
    expert_matmul_(out, lefts, rights, slots, rows, plan.offsets, bias, fine, False)
    for inner, matrix, held, fine in narrow[1:]:
        expert_matmul_(out, [inner.to(out.dtype)], [matrix], [held], None, plan.offsets, None, fine, True)
    return out


def _forward(
    left: Tensor, gather: bool, plan: RowPlan, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]
) -> tuple[Tensor, list[Tensor]]:
    inners = [term.inner(left, plan, gather) for term in terms]
    narrow = [(inner, term.right(), term.slots, term.fine) for inner, term in zip(inners, terms)]
    return _product(left, gather, plan, weight, bias, narrow), inners


def _backward(dy: Tensor, gather: bool, plan: RowPlan, weight: Tensor, terms: Sequence[Term], dinners: list) -> Tensor:
    """``dy·weight[e]ᵀ`` and what the terms add, ``[R, in]``."""
    entering = [(dinner, term.into(), term.slots, term.fine) for dinner, term in zip(dinners, terms)]
    narrow = [each for each in entering if each[1] is not None]
    dleft = _product(dy, gather, plan, weight.transpose(1, 2), None, narrow)
    for dinner, term in zip(dinners, terms):
        term.scatter(dleft, dinner, plan)
    return dleft


def _flat(terms: Sequence[Term]) -> tuple[list[Tensor], list[int]]:
    parts = [term.tensors() for term in terms]
    return [tensor for part in parts for tensor in part], [len(part) for part in parts]


def _terms_of(terms: Sequence[Term], tensors: Sequence[Tensor]) -> list[Term]:
    made, rest = [], list(tensors)
    for term in terms:
        count = len(term.tensors())
        made.append(term.of(*rest[:count]))
        rest = rest[count:]
    return made


def _term_grads(given: Sequence[tuple[Tensor, ...]], terms: Sequence[Term]) -> list[Tensor | None]:
    """Gradients of all tensors of the terms, None for those that do not train."""
    found: list[Tensor | None] = []
    for grads, term in zip(given, terms):
        found += [*grads, *[None] * (len(term.tensors()) - len(grads))]
    return found


def _weight_grad(weight: Tensor, left: Tensor, dy: Tensor, plan: RowPlan, gather: str) -> Tensor:
    """Of ``weight [E, in, out]``, which may lie ``[E, out, in]`` in memory: in its layout."""
    along = weight.stride(1) == 1 and weight.shape[1] > 1
    stored = weight.transpose(1, 2) if along else weight
    made = expert_grad(stored, left, dy, plan, plan.all, gather, turned=along)
    return made.transpose(1, 2) if along else made


def _bias_grad(bias: Tensor, dy: Tensor, plan: RowPlan) -> Tensor:
    sums = bias.new_zeros(bias.shape, dtype=compute_dtype(dy))
    rows = dy[: int(plan.offsets[-1])]
    return sums.index_add_(0, plan.expert_of_row()[: rows.shape[0]], rows.to(sums.dtype)).to(bias.dtype)


class _Up(Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        offsets: Tensor,
        places: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        terms: tuple,
        *tensors: Tensor,
    ) -> Tensor:
        plan = RowPlan(rows, offsets, places)
        y, inners = _forward(x, True, plan, weight, bias, _terms_of(terms, tensors))
        trains = any(ctx.needs_input_grad[7:]) or ctx.needs_input_grad[4]
        ctx.save_for_backward(
            x if trains else None, rows, offsets, places, weight, bias, *tensors, *(inners if trains else ())
        )
        ctx.terms, ctx.count = terms, len(tensors)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, offsets, places, weight, bias, *rest = ctx.saved_tensors
        plan, tensors, inners = RowPlan(rows, offsets, places), rest[: ctx.count], rest[ctx.count :]
        terms, needs, dy = _terms_of(ctx.terms, tensors), ctx.needs_input_grad, dy.contiguous()
        trains = any(needs[7:])
        dinners = [term.back(dy, plan, False) for term in terms] if trains or needs[0] else []
        dx = None
        if needs[0]:
            dx = expert_combine(_backward(dy, False, plan, weight, terms, dinners), places, None)
        dweight = _weight_grad(weight, x, dy, plan, "left") if needs[4] else None
        dbias = _bias_grad(bias, dy, plan) if needs[5] else None
        given = [
            term.grads(dy, x, inner, dinner, plan, "left")
            for term, inner, dinner in zip(terms, inners, dinners)
            if trains
        ]
        grads = _term_grads(given, terms) if trains else [None] * ctx.count
        return dx, None, None, None, dweight, dbias, None, *grads


class _Down(Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        gu: Tensor,
        weights: Tensor,
        rows: Tensor,
        offsets: Tensor,
        places: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Gate | None,
        terms: tuple,
        *tensors: Tensor,
    ) -> Tensor:
        plan = RowPlan(rows, offsets, places)
        h = gu if gate is None else gate.forward(gu)
        y, inners = _forward(h, False, plan, weight, bias, _terms_of(terms, tensors))
        ctx.save_for_backward(gu, weights, rows, offsets, places, weight, bias, *tensors, *inners)
        ctx.gate, ctx.terms, ctx.count = gate, terms, len(tensors)
        return expert_combine(y, places, weights.to(compute_dtype(y)))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gu, weights, rows, offsets, places, weight, bias, *rest = ctx.saved_tensors
        plan, tensors, inners = RowPlan(rows, offsets, places), rest[: ctx.count], rest[ctx.count :]
        terms, needs, dout = _terms_of(ctx.terms, tensors), ctx.needs_input_grad, dout.contiguous()
        trains, gate = any(needs[9:]), ctx.gate
        share = plan.by_row(weights)
        dinners = [term.back(dout, plan, True) for term in terms]
        h = gu if gate is None else gate.forward(gu) if trains or needs[1] or needs[5] else None
        given = [
            term.grads(dout, h, inner * share, dinner * share, plan, "dy")
            for term, inner, dinner in zip(terms, inners, dinners)
            if trains
        ]
        dweight = _weight_grad(weight, _shared(h, share), dout, plan, "right") if needs[5] else None
        dbias = _bias_grad(bias, dout.index_select(0, rows) * share, plan) if needs[6] else None
        dgu = dweights = None
        if needs[0] or needs[1]:
            dh = _backward(dout, True, plan, weight, terms, dinners)
            if needs[1]:
                dweights = _share_grad(h, dh, bias, dout, plan).to(weights.dtype)
            dh = _shared(dh, share)
            dgu = None if not needs[0] else dh if gate is None else gate.backward(dh, gu)
        grads = _term_grads(given, terms) if trains else [None] * ctx.count
        return dgu, dweights, None, None, None, dweight, dbias, None, None, *grads


def _shared(rows: Tensor, share: Tensor) -> Tensor:
    """Rows times their weights, rounded to the rows' dtype."""
    return (
        torch.mul(rows, share, out=torch.empty_like(rows))
        if not torch.compiler.is_compiling()
        else ((rows * share).to(rows.dtype))
    )


def _share_grad(h: Tensor, dh: Tensor, bias: Tensor | None, dout: Tensor, plan: RowPlan) -> Tensor:
    """The gradient of the weights ``[T, K]``: each row's output by its token's gradient, from what is inside."""
    wide = compute_dtype(h)
    by_row = torch.linalg.vecdot(h.to(wide), dh.to(wide))
    places = plan.places
    grad = by_row[places.clamp(min=0)].where(places >= 0, 0.0)
    if bias is None:
        return grad
    expert = plan.expert_of_row()[places.clamp(min=0)]
    return grad + (dout.to(wide) @ bias.to(wide).t()).gather(1, expert).where(places >= 0, 0.0)


def expert_up(x: Tensor, plan: RowPlan, weight: Tensor, bias: Tensor | None, terms: Sequence[Term] = ()) -> Tensor:
    """``x [T, H]`` -> ``[R, N]``: each row of the plan by its expert's ``weight [E, H, N]``, terms and ``bias [E, N]``.

    Differentiable in x, the weight, the bias, and what of the terms trains.
    """
    tensors, _ = _flat(terms)
    return apply(_Up, x, plan.rows, plan.offsets, plan.places, weight, bias, tuple(terms), *tensors)


def expert_down(
    gu: Tensor,
    weights: Tensor,
    plan: RowPlan,
    weight: Tensor,
    bias: Tensor | None,
    gate: Gate | None,
    terms: Sequence[Term] = (),
) -> Tensor:
    """``gu [R, 2I]`` (``[R, I]``, activated, without a gate) and routing ``weights [T, K]`` -> ``[T, H]``.

    ``Σ_k weights[t, k]·(gate(gu)·weight[e] + bias[e])``, ``weight [E, I, H]``. Differentiable in gu, the routing
    weights, the weight, the bias, and what of the terms trains; keeps gu.
    """
    tensors, _ = _flat(terms)
    plan_tensors = plan.rows, plan.offsets, plan.places
    return apply(_Down, gu, weights, *plan_tensors, weight, bias, gate, tuple(terms), *tensors)
