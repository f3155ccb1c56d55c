"""Products of a mixture's experts: rows sorted by expert, each group by its own expert's matrix.

  plan     rows of a token's experts, sorted by expert, stable: those of expert e are offsets[e] ≤ m < offsets[e + 1]
  product  out[m] = left[rows[m]]·right[e] + inner[m]·narrow[e] + bias[e]      one sum, one rounding
  gradient out[e] = Σ_m left[m]ᵀ·right[m]                                      fp32 sums
  combine  out[t] = Σ_k weights[t, k]·y[places[t, k]]                          no atomics: a token reads its own rows

Only experts that were hit cost anything. On a CPU that multiplies pairs of bf16 all groups are one call
(csrc/cpu/expert_linear.cpp), which reads a token's rows where they are; elsewhere they are torch's products, apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay._native import module
from inlay.ops._registry import as_rows, check_floating, check_same, compute_dtype, fail, raw_op
from inlay.ops.matmul_sum import ISA, unit_stride


@dataclass(frozen=True)
class RowPlan:
    """Which rows belong to which expert, made once for a block.

    Attributes:
        rows: int64 ``[R]``, the token of each row, R tokens times their experts; sorted by expert.
        offsets: int64 ``[E + 1]``, where each expert's rows begin. Rows from ``offsets[E]`` on have none.
        places: int64 ``[T, K]``, where the row of each token's k-th expert is; -1 for one that is not here.
    """

    rows: Tensor
    offsets: Tensor
    places: Tensor

    @property
    def experts(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1

    @property
    def all(self) -> Tensor:
        """The slots of a stack that holds a matrix for every expert."""
        return torch.arange(self.experts, device=self.offsets.device)

    def expert_of_row(self) -> Tensor:
        """int64 ``[R]``: each row's expert, E - 1 for a row without one."""
        numbers = torch.arange(self.rows.shape[0], device=self.rows.device)
        return (torch.searchsorted(self.offsets, numbers, right=True) - 1).clamp(max=self.experts - 1)

    def by_row(self, weights: Tensor) -> Tensor:
        """fp32 ``[R, 1]``: the weights ``[T, K]`` of the rows, 0 for a row without an expert."""
        wide = weights.reshape(-1).to(compute_dtype(weights))
        places = self.places.reshape(-1)
        spread = wide.new_zeros(wide.shape[0] + 1)
        return spread.scatter(0, places.where(places >= 0, wide.shape[0]), wide)[:-1, None]


def plan_rows(index: Tensor, experts: int) -> RowPlan:
    """The plan of tokens that go to the experts ``index`` int64 ``[T, K]``; ``experts`` itself stands for none.

    Raises:
        ValueError: an expert that is not there.
    """
    if index.dim() != 2 or index.is_floating_point():
        fail(
            "expert_linear",
            "index",
            "whole numbers [T, K]",
            f"{index.dtype} {tuple(index.shape)}",
            "pass top-k indices",
        )
    flat = index.reshape(-1).long()
    if flat.numel() and not torch.compiler.is_compiling() and flat.device.type == "cpu":
        low, high = (int(bound) for bound in flat.aminmax())
        if low < 0 or high > experts:
            fail("expert_linear", "index", f"experts from 0 to {experts - 1}", f"{low} to {high}", "route among them")
    ordered, order = flat.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(experts + 1, device=flat.device))
    places = torch.empty_like(flat).scatter_(0, order, torch.arange(flat.numel(), device=flat.device))
    places = places.where(flat < experts, -1)
    return RowPlan(order // max(index.shape[1], 1), offsets, places.view(index.shape))


def groups(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """``(expert, first row, end)`` of every expert that was hit."""
    starts = offsets.tolist()
    for expert, (first, end) in enumerate(zip(starts, starts[1:])):
        if end > first:
            yield expert, first, end


# --- the product ------------------------------------------------------------------------------------------


def _check_matmul(out: Tensor, lefts: list[Tensor], rights: list[Tensor], slots: list[Tensor]) -> None:
    op = "expert_matmul_"
    check_floating(op, "out", out)
    got = [(tuple(left.shape), tuple(right.shape)) for left, right in zip(lefts, rights)]
    fit = all(len(a) == 2 and len(b) == 3 and b[1:] == (a[1], out.shape[1]) for a, b in got)
    if not got or not len(lefts) == len(rights) == len(slots) <= 2 or not fit:
        wanted = f"1 or 2 pairs of [., K] and [n, K, {out.shape[1]}]"
        fail(op, "lefts, rights", wanted, f"{len(lefts)} and {len(rights)}: {got}", "match the shapes")


def _rows_of(t: Tensor, rows: Tensor | None, first: int, end: int) -> Tensor:
    return t[first:end] if rows is None else t.index_select(0, rows[first:end])


def in_pairs(*tensors: Tensor) -> bool:
    """Whether the engine's products take these activations."""
    return module().isa() == ISA and all(t.dtype == torch.bfloat16 and t.is_cpu and t.numel() for t in tensors)


def _matmul(
    out: Tensor,
    lefts: list[Tensor],
    rights: list[Tensor],
    slots: list[Tensor],
    rows: Tensor | None,
    offsets: Tensor,
    bias: Tensor | None,
    fine: bool,
    add: bool,
) -> None:
    if not in_pairs(*lefts) or out.dtype not in (torch.float32, torch.bfloat16):
        return _by_torch(out, lefts, rights, slots, rows, offsets, bias, add)
    _check_matmul(out, lefts, rights, slots)
    lefts = [as_rows(t.detach()) for t in lefts]
    rights = [_unit(t.detach()) for t in rights]
    bias = bias if bias is None else bias.detach().to(out.dtype).contiguous()
    module().expert_matmul(out.detach(), lefts, rights, slots, rows, offsets, bias, fine, add)


def _unit(t: Tensor) -> Tensor:
    return t if 1 in t.stride()[1:] or 1 in t.shape[1:] else t.contiguous()


def _by_torch(
    out: Tensor,
    lefts: list[Tensor],
    rights: list[Tensor],
    slots: list[Tensor],
    rows: Tensor | None,
    offsets: Tensor,
    bias: Tensor | None,
    add: bool,
) -> None:
    """A product of torch's for every expert that was hit; each rounded where it is added."""
    _check_matmul(out, lefts, rights, slots)
    held = [part.tolist() for part in slots]
    for expert, first, end in groups(offsets):
        to, begun = out.detach()[first:end], add
        for i, (left, right) in enumerate(zip(lefts, rights)):
            if (slot := held[i][expert]) < 0:
                continue
            a = _rows_of(left, rows if i == 0 else None, first, end).to(out.dtype)
            b = unit_stride(right[slot].to(out.dtype))
            _ = to.addmm_(a, b) if begun else torch.mm(a, b, out=to)
            begun = True
        if bias is not None and begun:
            to.add_(bias[expert])


@raw_op(native=_matmul, fake=lambda *args: None, mutates=("out",))
def expert_matmul_(
    out: Tensor,
    lefts: list[Tensor],
    rights: list[Tensor],
    slots: list[Tensor],
    rows: Tensor | None,
    offsets: Tensor,
    bias: Tensor | None,
    fine: bool,
    add: bool,
) -> None:
    """out [R, N] of each expert e's rows = Σ_i lefts[i] [R, K_i] · rights[i][slots[i][e]] [K_i, N] + bias[e] [N].

    rows int64 [R]: lefts[0] has other rows, and row m reads its rows[m]. slots int64 [E]: where an expert's matrix is,
    -1 where it has none; rows of experts without any stay as they are. bias [E, N]. add: onto what is there. fine: fp32
    rights take part with 16 bits of their 24 beside bf16 lefts, else with 8.
    """
    _check_matmul(out, lefts, rights, slots)
    wide = compute_dtype(out)
    for expert, first, end in groups(offsets):
        total = None
        for i, (left, right) in enumerate(zip(lefts, rights)):
            if (slot := int(slots[i][expert])) >= 0:
                a = _rows_of(left, rows if i == 0 else None, first, end).to(wide)
                product = a @ (right[slot] if fine else right[slot].to(left.dtype)).to(wide)
                total = product if total is None else total + product
        if total is None:
            continue
        total = total if bias is None else total + bias[expert].to(wide)
        out.detach()[first:end] = total + out[first:end].to(wide) if add else total


def expert_matmul(
    left: Tensor, right: Tensor, plan: RowPlan, slots: Tensor | None = None, gather: bool = False, dtype: object = None
) -> Tensor:
    """``left·right[e]`` of each row, ``[R, N]`` in ``dtype`` (left's); zero for experts without a matrix.

    Args:
        left: ``[R, K]``, or one row per token with ``gather``. right: ``[n, K, N]``. slots: None for all experts.
    """
    shape = plan.rows.shape[0], right.shape[2]
    out = left.new_zeros(shape, dtype=dtype or left.dtype)
    rows, slots = plan.rows if gather else None, plan.all if slots is None else slots
    expert_matmul_(out, [left], [right], [slots], rows, plan.offsets, None, False, False)
    return out


# --- gradients of matrices --------------------------------------------------------------------------------


def _check_grad(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dim() != 3 or out.shape[1:] != (left.shape[1], right.shape[1]):
        wanted = f"[n, {left.shape[1]}, {right.shape[1]}]"
        fail("expert_grad_", "out", wanted, tuple(out.shape), "pass room for every chosen expert's gradient")


def _grad(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    left_rows: Tensor | None,
    right_rows: Tensor | None,
    offsets: Tensor,
    slots: Tensor,
) -> None:
    if not in_pairs(left, right) or out.dtype not in (torch.float32, torch.bfloat16):
        return expert_grad_.reference(out, left, right, left_rows, right_rows, offsets, slots)
    _check_grad(out, left, right)
    left, right = as_rows(left.detach()), as_rows(right.detach())
    module().expert_grad(out.detach(), left, right, left_rows, right_rows, offsets, slots)


@raw_op(native=_grad, fake=lambda *args: None, mutates=("out",))
def expert_grad_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    left_rows: Tensor | None,
    right_rows: Tensor | None,
    offsets: Tensor,
    slots: Tensor,
) -> None:
    """out[slots[e]] [P, Q] = Σ leftᵀ·right over the rows of expert e, left [., P], right [., Q]; others stay.

    left_rows, right_rows int64 [R]: where row m is stored; None where it is row m.
    """
    _check_grad(out, left, right)
    wide = compute_dtype(left)
    for expert, first, end in groups(offsets):
        if (slot := int(slots[expert])) >= 0:
            a, b = _rows_of(left, left_rows, first, end), _rows_of(right, right_rows, first, end)
            out.detach()[slot] = a.to(wide).t() @ b.to(wide)


def expert_grad(
    like: Tensor, left: Tensor, right: Tensor, plan: RowPlan, slots: Tensor, gather: str = "", turned: bool = False
) -> Tensor:
    """The gradient of a stack ``like [n, P, Q]``: ``leftᵀ·right`` by expert, zero where none of its rows is.

    Args:
        gather: "left" or "right" for the operand that has a row per token. turned: ``like`` is ``[n, Q, P]``.
    """
    out = torch.zeros_like(like, memory_format=torch.contiguous_format)
    left_rows, right_rows = (plan.rows if gather == name else None for name in ("left", "right"))
    expert_grad_(out.transpose(1, 2) if turned else out, left, right, left_rows, right_rows, plan.offsets, slots)
    return out


# --- a token's rows ---------------------------------------------------------------------------------------


def _check_combine(y: Tensor, places: Tensor, weights: Tensor | None) -> None:
    check_floating("expert_combine", "y", y)
    if weights is not None:
        if weights.dtype != compute_dtype(y):
            fail("expert_combine", "weights", str(compute_dtype(y)), weights.dtype, "cast them first", TypeError)
        check_same("expert_combine", "weights", weights.to(places.dtype), "places", places, shape=True)


def _combine_native(y: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    _check_combine(y, places, weights)
    if not y.is_cpu:
        return expert_combine.reference(y, places, weights)
    out = y.new_empty(places.shape[0], y.shape[1])
    module().expert_combine(out, as_rows(y), as_rows(places), None if weights is None else as_rows(weights))
    return out


@raw_op(native=_combine_native, fake=lambda y, places, weights: y.new_empty(places.shape[0], y.shape[1]))
def expert_combine(y: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """y [R, H], places int64 [T, K], weights fp32 [T, K] or None (1) -> [T, H], fp32 sums in the order of k."""
    _check_combine(y, places, weights)
    wide = compute_dtype(y)
    total = y.new_zeros(places.shape[0], y.shape[1], dtype=wide)
    for k in range(places.shape[1]):
        there = places[:, k, None] >= 0
        part = y.index_select(0, places[:, k].clamp(min=0)).to(wide) if y.shape[0] else torch.zeros_like(total)
        total += torch.where(there, part if weights is None else part * weights[:, k, None], 0.0)
    return total.to(y.dtype)
