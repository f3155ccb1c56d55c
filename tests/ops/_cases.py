"""Every differentiable op beside the same sum in plain torch: a table for tests of what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from inlay import ops
from inlay.bases.four_bit import FourBit
from inlay.bases.int8 import Int8
from inlay.nn.table import _Lookup
from inlay.ops._registry import apply
from inlay.ops.base_linear import base_linear
from inlay.ops.base_products import DenseBase, DenseBaseT
from inlay.ops.expert_gate import Gate
from inlay.ops.expert_linear import RowPlan, plan_rows
from inlay.ops.expert_mlp import Channels, LowRank, expert_down, expert_up
from inlay.ops.lora_linear import lora_linear, swiglu_lora_linear
from inlay.ops.stacked_linear import Part, stacked_linear
from inlay.pieces.embedding import _AddLowRankRows, _AddRows
from inlay.pieces.linear.channel_map import _MapChannels
from inlay.pieces.linear.rescale import _ScaledSwiGLU

WIDE, NARROW, RANK = 24, 16, 3
BASES = ("dense", "conv1d", "nf4", "nf4 double", "int8")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.5


class Base:
    """A linear on some base: what an op takes, and the dense weight ``[out, in]`` that plain torch takes."""

    def __init__(self, kind: str, columns: int, rows: int, seed: int = 0) -> None:
        weight, self.bias = numbers(rows, columns, seed=seed), numbers(rows, seed=seed + 1)
        self.kind, self.trained = kind, []
        if kind in ("dense", "conv1d"):
            self.base = DenseBase if kind == "dense" else DenseBaseT
            self.held = weight if kind == "dense" else weight.t().contiguous()
            self.storage: tuple = (self.held,)
            return
        self.base = Int8(rows, columns) if kind == "int8" else FourBit(rows, columns, double_quant="double" in kind)
        self.storage = self.base.quantize(weight, "a weight")
        self.held = self.base.dequantize(torch.float32, *self.storage, None)

    @property
    def weight(self) -> Tensor:
        return self.held.t() if self.kind == "conv1d" else self.held

    @property
    def tensors(self) -> tuple:
        return (*self.storage, self.bias)

    def unfreeze(self) -> list[Tensor]:
        """Let the bias train, and a dense weight."""
        trained = [self.bias, *([self.held] if self.kind in ("dense", "conv1d") else [])]
        return [tensor.requires_grad_(True) for tensor in trained]

    def plain(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass
class Case:
    """``ours()`` and ``plain()`` compute the same tensors from the same ``leaves``; ``bases`` are frozen."""

    ours: Callable[[], Sequence[Tensor]]
    plain: Callable[[], Sequence[Tensor]]
    leaves: list[Tensor]
    bases: list[Base]


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return numbers(*shape, seed=seed).requires_grad_(True)


def _delta(values: Tensor, indices: Tensor, side: str, base: Base) -> Tensor:
    zero = torch.zeros(base.weight.shape)
    return zero.index_copy(1 if side == "in" else 0, indices, values)


def _submatrix(side: str, in_place: bool = False, gated: bool = False):
    def make(kind: str, rows: int) -> Case:
        base, x, up = Base(kind, WIDE, NARROW), leaf(2, rows, WIDE), leaf(2, rows, WIDE, seed=5)
        indices = torch.tensor([1, 4, 9])
        values = leaf(NARROW, 3, seed=7) if side == "in" else leaf(3, WIDE, seed=7)

        def ours():
            if gated:
                return (
                    ops.swiglu_submatrix_linear(
                        x, up, "silu", values, indices, base.base, *base.tensors, in_place=in_place
                    ),
                )
            op = ops.submatrix_linear_in_place if in_place else ops.submatrix_linear
            return (op(x, values, indices, side, base.base, *base.tensors),)

        def plain():
            h = functional.silu(x) * up if gated else x
            if in_place:
                weight = base.weight.index_copy(1 if side == "in" else 0, indices, values)
                return (functional.linear(h, weight, base.bias),)
            return (base.plain(h) + functional.linear(h, _delta(values, indices, side, base)),)

        return Case(ours, plain, [x, values, *([up] if gated else [])], [base])

    return make


def _add_delta(side: str):
    def make(kind: str, rows: int) -> Case:
        base, x = Base(kind, WIDE, NARROW), leaf(2, rows, WIDE)
        indices = torch.tensor([1, 4, 9])
        values = leaf(NARROW, 3, seed=7) if side == "in" else leaf(3, WIDE, seed=7)

        def ours():
            y = base_linear(x, base.base, *base.tensors)
            return (ops.submatrix_add_delta(y, x, values, indices, side),)

        def plain():
            return (base.plain(x) + functional.linear(x, _delta(values, indices, side, base)),)

        return Case(ours, plain, [x, values], [base])

    return make


def _alone(kind: str, rows: int) -> Case:
    base, x = Base(kind, WIDE, NARROW), leaf(2, rows, WIDE)
    return Case(lambda: (base_linear(x, base.base, *base.tensors),), lambda: (base.plain(x),), [x], [base])


def _gated_alone(kind: str, rows: int) -> Case:
    base, gate, up = Base(kind, WIDE, NARROW), leaf(2, rows, WIDE), leaf(2, rows, WIDE, seed=5)
    return Case(
        lambda: (ops.swiglu_linear(gate, up, "gelu", base.base, *base.tensors),),
        lambda: (base.plain(functional.gelu(gate) * up),),
        [gate, up],
        [base],
    )


def _factors(columns: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return leaf(RANK, columns, seed=seed + 3), leaf(rows, RANK, seed=seed + 4)


def _lora(dropped: bool = False, gated: bool = False):
    def make(kind: str, rows: int) -> Case:
        base, x, up = Base(kind, WIDE, NARROW), leaf(2, rows, WIDE), leaf(2, rows, WIDE, seed=5)
        (a, b), mask = _factors(WIDE, NARROW), (numbers(2, rows, WIDE, seed=9) > 0).float()

        def ours():
            if gated:
                return (swiglu_lora_linear(x, up, "silu", a, b, 2.0, base.base, *base.tensors),)
            drop = x * mask if dropped else None
            return (lora_linear(x, a, b, 2.0, base.base, *base.tensors, dropped=drop),)

        def plain():
            h = functional.silu(x) * up if gated else x
            return (base.plain(h) + 2.0 * (h * mask if dropped else h) @ a.t() @ b.t(),)

        return Case(ours, plain, [x, a, b, *([up] if gated else [])], [base])

    return make


def _stack(apart: bool, factors: Sequence[bool]):
    def make(kind: str, rows: int) -> Case:
        x = leaf(2, rows, WIDE)
        bases = [Base(kind, WIDE, NARROW + 8 * i, seed=20 * i) for i in range(len(factors))]
        pairs = [_factors(WIDE, NARROW + 8 * i, seed=30 * i) if f else None for i, f in enumerate(factors)]

        def ours():
            parts = [
                Part(base.base, base.tensors, *(pair or (None, None)), 2.0)
                for base, pair in zip(bases, pairs, strict=True)
            ]
            return stacked_linear(x, parts, apart)

        def plain():
            return [
                base.plain(x) + (0 if pair is None else 2.0 * x @ pair[0].t() @ pair[1].t())
                for base, pair in zip(bases, pairs, strict=True)
            ]

        return Case(ours, plain, [x, *(t for pair in pairs if pair for t in pair)], bases)

    return make


#: Ops that take a base, by name: ``make(kind of base, rows)``.
ON_A_BASE = {
    "base_linear": _alone,
    "submatrix_linear in": _submatrix("in"),
    "submatrix_linear out": _submatrix("out"),
    "submatrix_linear_in_place in": _submatrix("in", in_place=True),
    "submatrix_linear_in_place out": _submatrix("out", in_place=True),
    "submatrix_add_delta in": _add_delta("in"),
    "submatrix_add_delta out": _add_delta("out"),
    "swiglu_linear": _gated_alone,
    "swiglu_submatrix_linear": _submatrix("in", gated=True),
    "swiglu_submatrix_linear in place": _submatrix("in", in_place=True, gated=True),
    "lora_linear": _lora(),
    "lora_linear dropped": _lora(dropped=True),
    "swiglu_lora_linear": _lora(gated=True),
    "stacked_linear": _stack(False, (True, True)),
    "stacked_linear apart": _stack(True, (True, False, True)),
    "stacked_linear frozen": _stack(False, (False, False)),
}


def fits(op: str, kind: str) -> bool:
    """Values are written into dense weights alone."""
    return "in place" not in op.replace("_", " ") or kind in ("dense", "conv1d")


def _norm(offset: float):
    def make() -> Case:
        x, weight = leaf(2, 5, WIDE), leaf(WIDE, seed=1)

        def plain():
            return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (offset + weight),)

        return Case(lambda: (ops.rms_norm(x, weight, 1e-5, offset),), plain, [x, weight], [])

    return make


def _scale_shift(scaled: bool, shifted: bool, chosen: bool = False):
    def make() -> Case:
        x, channels = leaf(2, 5, WIDE), torch.tensor([1, 4, 9]) if chosen else None
        size = 3 if chosen else WIDE
        gamma, beta = (leaf(size, seed=1 + i) if given else None for i, given in enumerate((scaled, shifted)))

        def plain():
            y = x[..., channels] if chosen else x
            y = (1.0 if gamma is None else gamma) * y + (0.0 if beta is None else beta)
            return (x.index_copy(-1, channels, y) if chosen else y,)

        leaves = [t for t in (x, gamma, beta) if t is not None]
        return Case(lambda: (ops.scale_shift(x, gamma, beta, channels),), plain, leaves, [])

    return make


def _swiglu() -> Case:
    gate, up = leaf(2, 5, WIDE), leaf(2, 5, WIDE, seed=5)
    return Case(lambda: (ops.swiglu(gate, up),), lambda: (functional.silu(gate) * up,), [gate, up], [])


def _scaled_swiglu() -> Case:
    gate, up, scale = leaf(2, 5, WIDE), leaf(2, 5, WIDE, seed=5), leaf(WIDE, seed=6)
    return Case(
        lambda: (apply(_ScaledSwiGLU, gate, up, "silu", scale),),
        lambda: (functional.silu(gate) * up * scale,),
        [gate, up, scale],
        [],
    )


def _map_channels() -> Case:
    y, matrix, bias, channels = leaf(2, 5, WIDE), leaf(3, 3, seed=5), leaf(3, seed=6), torch.tensor([1, 4, 9])

    def plain():
        chosen = y[..., channels]
        return (y.index_copy(-1, channels, chosen + chosen @ matrix.t() + bias),)

    return Case(lambda: (apply(_MapChannels, y, matrix, bias, channels),), plain, [y, matrix, bias], [])


def _plan() -> RowPlan:
    return plan_rows(torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [2, 1]]), 3)


def _experts_up() -> Case:
    plan, x, weight, bias = _plan(), leaf(5, WIDE), leaf(3, WIDE, NARROW, seed=5), leaf(3, NARROW, seed=6)
    a, b = leaf(3, RANK, WIDE, seed=7), leaf(3, NARROW, RANK, seed=8)

    def plain():
        expert, changed = plan.expert_of_row(), weight + 2.0 * (b @ a).transpose(1, 2)
        return ((x[plan.rows, None] @ changed[expert])[:, 0] + bias[expert],)

    term = LowRank(a, b, plan.all, 2.0)
    return Case(lambda: (expert_up(x, plan, weight, bias, (term,)),), plain, [x, weight, bias, a, b], [])


def _experts_down() -> Case:
    plan, gu, routing = _plan(), leaf(10, 2 * NARROW), leaf(5, 2, seed=5)
    weight, bias, values = leaf(3, NARROW, WIDE, seed=6), leaf(3, WIDE, seed=7), leaf(3, WIDE, 2, seed=8)
    indices = torch.tensor([[0, 3], [2, 9], [1, 4]])

    def plain():
        expert, h = plan.expert_of_row(), functional.silu(gu[:, :NARROW]) * gu[:, NARROW:]
        rows = (h[:, None] @ weight[expert])[:, 0] + bias[expert]
        rows = rows + (h.gather(1, indices[expert])[:, None] @ values[expert].transpose(1, 2))[:, 0]
        return ((routing[..., None] * rows[plan.places]).sum(1),)

    term = Channels(values, indices, plan.all)
    leaves = [gu, routing, weight, bias, values]
    return Case(lambda: (expert_down(gu, routing, plan, weight, bias, Gate("silu"), (term,)),), plain, leaves, [])


def _add_rows() -> Case:
    y, values = leaf(2, 5, WIDE), leaf(3, WIDE, seed=5)
    indices, ids = torch.tensor([2, 3, 7]), torch.tensor([[0, 2, 7, 2, 9], [3, 3, 1, 7, 5]])

    def plain():
        table = torch.zeros(10, WIDE).index_copy(0, indices, values)
        return (y + 0.5 * functional.embedding(ids, table),)

    return Case(lambda: (apply(_AddRows, y, values, indices, ids, 0.5, None),), plain, [y, values], [])


def _add_low_rank_rows() -> Case:
    y, a, b = leaf(2, 5, WIDE), leaf(4, 10, seed=5), leaf(WIDE, 4, seed=6)
    ids = torch.tensor([[0, 2, 7, 2, 9], [3, 3, 1, 7, 5]])

    def plain():
        return (y + 0.5 * functional.embedding(ids, (b @ a).t()),)

    return Case(lambda: (apply(_AddLowRankRows, y, a, b, ids, 0.5, None),), plain, [y, a, b], [])


def _table() -> Case:
    table, ids = leaf(40, WIDE), torch.tensor([[0, 2, 7, 2, 9], [3, 39, 2, 7, 5]])
    ours = lambda: (apply(_Lookup, table, ids, 7),)  # noqa: E731
    return Case(ours, lambda: (functional.embedding(ids, table, padding_idx=7),), [table], [])


def _rope(trained_angles: bool):
    def make() -> Case:
        q, k = leaf(2, 4, 5, 8), leaf(2, 2, 5, 8)
        angles = numbers(1, 5, 4, seed=3).repeat(1, 1, 2)
        cos, sin = (f(angles).requires_grad_(trained_angles) for f in (torch.cos, torch.sin))

        def rotate(x):
            half = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
            return x * cos[:, None] + half * sin[:, None]

        leaves = [q, k, *([cos, sin] if trained_angles else [])]
        return Case(lambda: ops.rope(q, k, cos, sin), lambda: (rotate(q), rotate(k)), leaves, [])

    return make


def _attention(softcap: float | None = None, sunk: bool = False):
    def make() -> Case:
        q, k, v = leaf(2, 4, 5, 8), leaf(2, 2, 5, 8), leaf(2, 2, 5, 8, seed=2)
        sinks = leaf(4, seed=3) if sunk else None

        def plain():
            keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
            scores = (q @ keys.transpose(-1, -2)) * 8**-0.5
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
            if sunk:
                scores = torch.cat((scores, sinks[:, None, None].expand(2, -1, 5, 1)), -1)
            return (scores.softmax(-1)[..., :5] @ values,)

        leaves = [q, k, v, *([sinks] if sunk else [])]
        return Case(lambda: (ops.attention(q, k, v, softcap=softcap, sinks=sinks),), plain, leaves, [])

    return make


def _gated_delta_rule() -> Case:
    q, k, v = leaf(2, 5, 2, 8), leaf(2, 5, 2, 8, seed=1), leaf(2, 5, 4, 6)
    g, beta, state = leaf(2, 5, 4), leaf(2, 5, 4, seed=2), leaf(2, 4, 8, 6)

    def plain():
        queries, keys = (t.repeat_interleave(2, 2) for t in (q * 8**-0.5, k))
        held, outs = state, []
        for t in range(5):
            held = held * g[:, t, :, None, None].exp()
            change = beta[:, t, :, None] * (v[:, t] - (held * keys[:, t, :, :, None]).sum(2))
            held = held + keys[:, t, :, :, None] * change[:, :, None]
            outs.append((held * queries[:, t, :, :, None]).sum(2))
        return torch.stack(outs, 1), held

    return Case(lambda: ops.gated_delta_rule(q, k, v, g, beta, state), plain, [q, k, v, g, beta, state], [])


def _causal_conv1d(silu: bool, biased: bool):
    def make() -> Case:
        x, weight = leaf(2, 5, WIDE), leaf(WIDE, 4, seed=1)
        bias = leaf(WIDE, seed=2) if biased else None

        def plain():
            z = functional.conv1d(x.mT, weight[:, None], bias, padding=3, groups=WIDE)[..., :5].mT
            return (functional.silu(z) if silu else z,)

        leaves = [t for t in (x, weight, bias) if t is not None]
        return Case(lambda: (ops.causal_conv1d(x, weight, bias, silu),), plain, leaves, [])

    return make


def _loss() -> Case:
    hidden, head = leaf(2, 5, WIDE), nn.Linear(WIDE, 17)
    labels = torch.tensor([[1, 5, -100, 3, 2], [0, 16, 4, -100, 9]])

    def ours():
        return (ops.linear_cross_entropy(hidden, head.weight, labels, bias=head.bias),)

    def plain():
        return (functional.cross_entropy(head(hidden).flatten(0, 1), labels.flatten()),)

    return Case(ours, plain, [hidden, head.weight, head.bias], [])


#: Ops that take no base.
WITHOUT_A_BASE: dict[str, Callable[[], Case]] = {
    "rms_norm": _norm(0.0),
    "rms_norm with offset": _norm(1.0),
    "scale_shift": _scale_shift(True, True),
    "scale_shift, scale alone": _scale_shift(True, False),
    "scale_shift, shift alone": _scale_shift(False, True),
    "scale_shift, chosen channels": _scale_shift(True, True, chosen=True),
    "swiglu": _swiglu,
    "swiglu, scaled": _scaled_swiglu,
    "map of channels": _map_channels,
    "experts, up": _experts_up,
    "experts, down": _experts_down,
    "rows of an embedding": _add_rows,
    "low-rank rows of an embedding": _add_low_rank_rows,
    "rows of a table that trains": _table,
    "rope": _rope(False),
    "rope, trained angles": _rope(True),
    "attention": _attention(),
    "attention with a soft cap": _attention(0.5),
    "attention with sinks": _attention(2.0, sunk=True),
    "causal_conv1d": _causal_conv1d(True, True),
    "causal_conv1d, taps alone": _causal_conv1d(False, False),
    "gated_delta_rule": _gated_delta_rule,
    "linear_cross_entropy": _loss,
}
