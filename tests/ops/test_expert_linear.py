"""Products of rows that are sorted by expert, against float64 and against a loop over tokens."""

import pytest
import torch
from _compare import assert_as_good, assert_bits, padded_rows, wide
from torch import nn

from inlay import _native
from inlay.ops.expert_gate import Gate, expert_gate_backward, halves
from inlay.ops.expert_linear import (
    expert_combine,
    expert_grad,
    expert_grad_,
    expert_matmul,
    expert_matmul_,
    plan_rows,
)
from inlay.ops.expert_mlp import Channels, LowRank, expert_down, expert_up
from inlay.ops.matmul_sum import ISA

EXPERTS = 6


def routed(kind: str, tokens: int = 40, chosen: int = 2) -> torch.Tensor:
    """Experts of tokens: all kinds of loads, with experts of no, one and all rows."""
    if kind == "one":
        return torch.full((tokens, 1), 3)
    if kind == "none":
        return torch.empty(0, chosen, dtype=torch.int64)
    if kind == "rare":  # one row for the first, none for the last two
        index = torch.randint(1, EXPERTS - 2, (tokens, 1))
        index[0] = 0
        return index
    return torch.rand(tokens, EXPERTS).topk(chosen).indices


KINDS = ["even", "one", "rare", "none"]


def test_a_plan_sorts_rows_by_expert():
    index = torch.tensor([[2, 0], [0, 3], [2, 1]])
    plan = plan_rows(index, 3)  # 3 stands for none
    assert plan.offsets.tolist() == [0, 2, 3, 5]
    assert plan.rows[:5].tolist() == [0, 1, 2, 0, 2]
    assert plan.places.tolist() == [[3, 0], [1, -1], [4, 2]]
    assert plan.expert_of_row()[:5].tolist() == [0, 0, 1, 2, 2]
    assert plan.by_row(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))[:5, 0].tolist() == [2, 3, 6, 1, 5]
    for bad in (index - 1, index + 1):
        with pytest.raises(ValueError, match="experts from 0 to 2"):
            plan_rows(bad, 3)
    with pytest.raises(ValueError, match=r"\[T, K\]"):
        plan_rows(index.float(), 3)


def by_token(plan, left, stack):
    """A row after the other."""
    out = left.new_zeros(plan.rows.shape[0], stack.shape[2])
    for row, expert in enumerate(plan.expert_of_row().tolist()):
        out[row] = left[plan.rows[row]] @ stack[expert]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products_against_float64(path, kind, turned, dtype):
    plan = plan_rows(routed(kind), EXPERTS)
    x = torch.randn(40, 50, dtype=dtype)
    stack = torch.randn(EXPERTS, *((33, 50) if turned else (50, 33)), dtype=dtype)
    stack = stack.transpose(1, 2) if turned else stack
    ours = expert_matmul(x, stack, plan, gather=True)
    exact = by_token(plan, *wide(x, stack))
    assert_as_good(ours, by_token(plan, x.float(), stack.float()).to(dtype), exact, "y", slack=4)
    again = expert_matmul(padded_rows(x[plan.rows]), stack, plan)
    assert_bits(again, ours, "rows at hand, or read where their tokens are")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_product_a_bias_and_what_is_there(path, dtype):
    plan = plan_rows(routed("even"), EXPERTS)
    x, stack, bias = torch.randn(40, 20, dtype=dtype), torch.randn(EXPERTS, 20, 70), torch.randn(EXPERTS, 70)
    stack, bias = stack.to(dtype), bias.to(dtype)
    inner, narrow = torch.randn(80, 5, dtype=dtype), torch.randn(3, 5, 70)
    slots = torch.tensor([2, -1, 0, -1, 1, -1])
    before = torch.randn(80, 70, dtype=dtype)
    out = before.clone()
    args = [x, inner], [stack, narrow], [plan.all, slots], plan.rows, plan.offsets, bias
    expert_matmul_(out, *args, True, True)

    def total(x, stack, inner, narrow, bias, before):
        chosen = torch.where(slots[:, None, None] >= 0, narrow[slots.clamp(min=0)], 0.0)
        expert = plan.expert_of_row()
        added = torch.einsum("mr,mrn->mn", inner, chosen[expert])
        return by_token(plan, x, stack) + added + bias[expert] + before

    values = x, stack, inner, narrow, bias, before
    plain = total(*(t.float() for t in values)).to(dtype)
    assert_as_good(out, plain, total(*wide(*values)), "sum", slack=12)
    only = before.clone()  # rows of experts without a matrix stay
    expert_matmul_(only, [inner], [narrow], [slots], None, plan.offsets, None, False, False)
    chosen = slots[plan.expert_of_row()] >= 0
    assert_bits(only[~chosen], before[~chosen])
    assert bool((only[chosen] != before[chosen]).any(1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(4, 45), (45, 4), (40, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_matrices(path, kind, widths, dtype):
    plan = plan_rows(routed(kind), EXPERTS)
    left, right = torch.randn(plan.rows.shape[0], widths[0], dtype=dtype), torch.randn(40, widths[1], dtype=dtype)
    slots = torch.tensor([1, 0, -1, 2, 3, -1])
    ours = expert_grad(torch.empty(4, *widths), left, right, plan, slots, gather="right")
    turned = expert_grad(torch.empty(4, *widths[::-1]), left, right, plan, slots, gather="right", turned=True)
    exact, plain = torch.zeros(4, *widths, dtype=torch.float64), torch.zeros(4, *widths)
    for row, expert in enumerate(plan.expert_of_row().tolist()):
        if slots[expert] >= 0:
            a, b = left[row], right[plan.rows[row]]
            exact[slots[expert]] += torch.outer(*wide(a, b))
            plain[slots[expert]] += torch.outer(a.float(), b.float())
    assert_as_good(ours, plain, exact, "dW", slack=8)
    assert_as_good(turned, plain.transpose(1, 2), exact.transpose(1, 2), "dW turned", slack=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 64, 100])
def test_a_token_sums_its_rows(path, width, dtype):
    index = routed("even", tokens=9, chosen=3)
    index[2, 1] = EXPERTS  # none
    plan = plan_rows(index, EXPERTS)
    y, weights = torch.randn(27, width).to(dtype), torch.randn(9, 3)

    def total(y, weights):
        rows = torch.where(plan.places[..., None] >= 0, y[plan.places.clamp(min=0)], 0.0)
        return (rows * weights[..., None]).sum(1)

    ones = torch.ones_like(weights)
    for ours, given in (
        (expert_combine(y, plan.places, weights), weights),
        (expert_combine(y, plan.places, None), ones),
    ):
        assert_as_good(ours, total(y.float(), given).to(dtype), total(*wide(y, given)), "sum", slack=3)


def test_bits_do_not_depend_on_threads():
    plan = plan_rows(torch.cat([routed("rare", 90), routed("one", 50)]), EXPERTS)
    x, stack = torch.randn(140, 300).bfloat16(), torch.randn(EXPERTS, 300, 130).bfloat16()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        y = expert_matmul(x, stack, plan, gather=True)
        results.append(
            (y, expert_grad(stack, x, y, plan, plan.all, gather="left"), expert_combine(y, plan.places, None))
        )
    torch.set_num_threads(before)
    if _native.available() and _native.module().isa() == ISA:  # torch's products do not promise it
        for result in results[1:]:
            for ours, first in zip(result, results[0], strict=True):
                assert_bits(ours, first)


def test_errors_name_both_shapes():
    plan = plan_rows(routed("even"), EXPERTS)
    x, stack = torch.randn(40, 5).bfloat16(), torch.randn(EXPERTS, 6, 4).bfloat16()
    with pytest.raises(ValueError, match=r"1 or 2 pairs of \[., K\] and \[n, K, 4\].*\(40, 5\), \(6, 6, 4\)"):
        expert_matmul(x, stack, plan, gather=True)
    with pytest.raises(ValueError, match=r"\[n, 5, 4\]"):
        expert_grad(torch.empty(2, 3, 3), x, torch.randn(80, 4).bfloat16(), plan, plan.all, gather="left")
    with pytest.raises(TypeError, match="float32"):
        expert_combine(torch.randn(80, 4), plan.places, torch.ones(40, 2).bfloat16())


@pytest.mark.skipif(not _native.available() or _native.module().isa() != ISA, reason="products of torch's")
def test_the_engine_refuses_rows_that_are_not_there():
    plan = plan_rows(routed("even"), EXPERTS)
    x, stack = torch.randn(40, 8).bfloat16(), torch.randn(EXPERTS, 8, 4).bfloat16()
    with pytest.raises(ValueError, match="numbers of rows that there are"):
        expert_matmul(x[:20], stack, plan, gather=True)
    with pytest.raises(ValueError, match="numbers of matrices that there are"):
        expert_matmul(x, stack[:2], plan, gather=True)


def test_opcheck():
    plan = plan_rows(routed("even"), EXPERTS)
    x, stack, narrow = torch.randn(40, 6), torch.randn(EXPERTS, 6, 5), torch.randn(EXPERTS, 3, 5)
    out, inner = torch.randn(80, 5), torch.randn(80, 3)
    check = torch.library.opcheck
    args = [x, inner], [stack, narrow], [plan.all, plan.all], plan.rows, plan.offsets, torch.randn(EXPERTS, 5)
    check(expert_matmul_.overload, (out, *args, True, True))
    check(expert_grad_.overload, (torch.randn(EXPERTS, 6, 5), x, out, plan.rows, None, plan.offsets, plan.all))
    check(expert_combine.overload, (out, plan.places, torch.rand(40, 2)))
    check(expert_gate_backward.overload, (torch.randn(4, 3), torch.randn(4, 6), "silu", True, 1.0, 1.0, 0.0))


GATES = [
    Gate("silu"),
    Gate("gelu_tanh", True),
    Gate("gelu"),
    Gate("clamped", True, 1.702, 0.7, 1.0),
    Gate("clamped", False, 1.0, 1.3, 0.0),
]


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates_as_eager_modules_have_them(path, gate):
    gu, dh = torch.randn(13, 10), torch.randn(13, 5)

    def eager(gu):
        g, u = halves(gu, gate.interleaved)
        if gate.act == "clamped":  # transformers' GptOssExperts._apply_gate
            g, u = g.clamp(max=gate.limit), u.clamp(min=-gate.limit, max=gate.limit)
            return (u + gate.plus) * (g * torch.sigmoid(g * gate.alpha))
        act = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}[gate.act]
        return act(g) * u

    for dtype in (torch.float32, torch.bfloat16):
        held = gu.to(dtype)
        rounded = held.double().requires_grad_(True)
        plain = eager(held.float() if dtype == torch.bfloat16 else held).to(dtype)
        assert_as_good(gate.forward(held), plain, eager(rounded).detach(), "h", slack=2)
        (exact,) = torch.autograd.grad(eager(rounded), rounded, dh.to(dtype).double())
        assert_as_good(gate.backward(dh.to(dtype), held), exact.to(dtype), exact, "dgu", slack=4)
    with pytest.raises(ValueError, match="act: wanted one of"):
        Gate("relu")


@pytest.mark.parametrize("gate", [Gate("clamped", True, 1.7, 0.7, 1.0), Gate("silu"), None], ids=str)
def test_the_whole_block_s_gradients(gate):
    """Of tokens, routing weights, matrices, biases and terms; with an expert that nobody goes to, and rows of none."""
    random = {"dtype": torch.float64, "requires_grad": True}
    index = torch.stack([torch.randperm(5)[:2] for _ in range(8)])
    index[index == 4] = 5
    plan = plan_rows(index, 5)
    inner, hidden = 7, 6
    wide_inner = inner if gate is None else 2 * inner
    x, share = torch.randn(8, hidden, **random), torch.rand(8, 2, **random)
    up, down = torch.randn(5, wide_inner, hidden, **random), torch.randn(5, inner, hidden, **random)
    biases = torch.randn(5, wide_inner, **random), torch.randn(5, hidden, **random)
    a, b = torch.randn(3, 2, hidden, **random), torch.randn(3, wide_inner, 2, **random)
    a2, b2, v = (
        torch.randn(5, 2, inner, **random),
        torch.randn(5, hidden, 2, **random),
        torch.randn(5, hidden, 3, **random),
    )
    channels = torch.stack([torch.randperm(inner)[:3] for _ in range(5)])
    slots = torch.tensor([0, -1, 1, -1, 2])

    def block(x, share, up, down, bias, out_bias, a, b, a2, b2, v):
        gu = expert_up(x, plan, up.transpose(1, 2), bias, [LowRank(a, b, slots, 0.5)])
        terms = [LowRank(a2, b2, plan.all, 2.0), Channels(v, channels, plan.all)]
        return expert_down(gu, share, plan, down, out_bias, gate, terms)

    assert torch.autograd.gradcheck(block, (x, share, up, down, *biases, a, b, a2, b2, v))


def test_nothing_as_wide_as_the_stream_is_kept_for_a_token_s_rows():
    """What is kept: the tokens, gate and up, and columns of the rank."""
    tokens, hidden, inner, rank = 64, 48, 16, 2
    plan = plan_rows(routed("even", tokens), EXPERTS)
    x = torch.randn(tokens, hidden, requires_grad=True)
    up, down = torch.randn(EXPERTS, hidden, 2 * inner), torch.randn(EXPERTS, inner, hidden)
    a, b = torch.randn(EXPERTS, rank, hidden, requires_grad=True), torch.zeros(EXPERTS, 2 * inner, rank)
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    frozen = {t.untyped_storage().data_ptr() for t in (up, down, a, b)}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gu = expert_up(x, plan, up, None, [LowRank(a, b, plan.all, 1.0)])
        out = expert_down(gu, torch.rand(tokens, 2), plan, down, None, Gate("silu"))
    bytes_kept = sum(size for pointer, size in kept.items() if pointer not in frozen)
    rows = 2 * tokens
    assert bytes_kept <= 4 * (tokens * hidden + rows * (2 * inner + rank) + 2 * tokens) + 8 * (3 * rows + 3 * EXPERTS)
    out.sum().backward()
    assert bool(x.grad.any())
