"""What holds for every differentiable op: in-place operations may follow, and what is unfrozen gets its gradient."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from _cases import BASES, ON_A_BASE, WITHOUT_A_BASE, Base, fits, leaf, numbers
from comparing import assert_close
from torch.autograd.function import BackwardCFunction

import inlay
from inlay.ops.base_linear import base_linear

#: Rows of one of two sequences: few are decoded as they are, many make products.
FEW, MANY = 3, 13
CASES = [
    pytest.param(lambda op=op, kind=kind, rows=rows: ON_A_BASE[op](kind, rows), id=f"{op}-{kind}-{rows}")
    for op in ON_A_BASE
    for kind in BASES
    if fits(op, kind)
    for rows in (FEW, MANY)
] + [pytest.param(make, id=op) for op, make in WITHOUT_A_BASE.items()]
IN_PLACE = {
    "add_": (lambda y: y.add_(1.0), lambda y: y + 1.0),
    "mul_": (lambda y: y.mul_(-2.0), lambda y: y * -2.0),
    "clamp_": (lambda y: y.clamp_(-0.4, 5.0), lambda y: y.clamp(-0.4, 5.0)),
}


def gradients(outputs, wanted):
    """Gradients of a sum in which every output has weights of its own."""
    loss = sum((y * numbers(*y.shape, seed=40 + i)).sum() for i, y in enumerate(outputs))
    return torch.autograd.grad(loss, wanted)


def assert_same(ours, plain, what):
    for i, (one, other) in enumerate(zip(ours, plain, strict=True)):
        assert bool(other.any()), f"{what} {i}: nothing to compare"
        assert_close(one, other, atol=2e-5 * float(other.abs().max()), what=f"{what} {i}")


@pytest.fixture(params=["one by one", "wide sums"])
def sums(request):
    if request.param == "wide sums":
        request.getfixturevalue("wide_sums")


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("make", [case for case in CASES if not case.id.startswith("attention")])
def test_outputs_may_be_changed_in_place(make, name, sums):
    """Each output in turn, so that neighbours in one memory would show."""
    in_place, plain = IN_PLACE[name]
    for which in range(len(make().ours())):
        case = make()
        ours, wanted = list(case.ours()), list(case.plain())
        ours[which], wanted[which] = in_place(ours[which]), plain(wanted[which])
        assert_same([y.detach() for y in ours], [y.detach() for y in wanted], "output")
        assert_same(gradients(ours, case.leaves), gradients(wanted, case.leaves), "gradient")


@pytest.mark.parametrize("make", CASES)
def test_outputs_are_no_views(make, sums):
    """Those of Functions; views that plain autograd makes are its own affair."""
    ours = [y for y in make().ours() if isinstance(y.grad_fn, BackwardCFunction)]
    assert not any(y._is_view() for y in ours)


@pytest.mark.parametrize("op", ["base_linear", "submatrix_linear in", "swiglu_lora_linear", "stacked_linear"])
def test_outputs_may_be_changed_in_place_in_a_compiled_graph(op, sums):
    case = ON_A_BASE[op]("nf4", MANY)

    def changed():
        first, *others = case.ours()
        return sum((y * y).sum() for y in [first.mul_(2.0), *others])

    wanted = torch.autograd.grad(changed(), case.leaves)
    torch.compiler.reset()
    compiled = torch.compile(changed, fullgraph=True, backend="aot_eager")
    assert_same(torch.autograd.grad(compiled(), case.leaves), wanted, "gradient")


def test_a_saved_output_that_is_changed_is_noticed():
    """The attention keeps its output for the backward, as torch's does."""
    case = WITHOUT_A_BASE["attention"]()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients([case.ours()[0].mul_(2.0)], case.leaves)


@pytest.mark.parametrize("op, kind", [(op, kind) for op in ON_A_BASE for kind in BASES if fits(op, kind)])
def test_what_of_a_base_is_unfrozen_trains(op, kind, sums):
    """A bias on any base, and a dense weight, get the gradients of plain torch, and nothing else changes."""
    for rows in (FEW, MANY):
        frozen, case = ON_A_BASE[op](kind, rows), ON_A_BASE[op](kind, rows)
        trained = [tensor for base in case.bases for tensor in base.unfreeze()]
        wanted = gradients(case.plain(), case.leaves + trained)
        ours = case.ours()
        assert_same([y.detach() for y in ours], [y.detach() for y in frozen.ours()], "output")
        assert_same(gradients(ours, case.leaves + trained), wanted, "gradient")


@pytest.mark.parametrize("op, kind", [(op, kind) for op in ON_A_BASE for kind in ("dense", "nf4") if fits(op, kind)])
def test_what_of_a_base_is_unfrozen_trains_under_autocast(op, kind):
    case = ON_A_BASE[op](kind, MANY)
    trained = [tensor for base in case.bases for tensor in base.unfreeze()]
    wanted = gradients(case.plain(), case.leaves + trained)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(case.ours(), case.leaves + trained)
    for one, other in zip(ours, wanted, strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other, atol=0.03 * float(other.abs().max()))


@pytest.mark.parametrize(
    "op", [op for op in ON_A_BASE if fits(op, "nf4") and not op.startswith("submatrix_add") and "dropped" not in op]
)
def test_nothing_unfrozen_takes_the_fused_way(op, sums):
    """The frozen base costs no node of its own: one Function from the leaves to the outputs."""
    case = ON_A_BASE[op]("nf4", MANY)
    nodes = {y.grad_fn for y in case.ours()}
    assert len(nodes) == 1
    below = [node for node, _ in nodes.pop().next_functions if node is not None]
    assert all(hasattr(node, "variable") for node in below)


def test_scales_of_a_packed_weight_cannot_train():
    base = Base("nf4", 24, 16)
    base.storage[1].requires_grad_(True)
    with pytest.raises(TypeError, match="scales of a packed weight"):
        base_linear(leaf(2, 24), base.base, *base.tensors)


def test_second_derivatives_are_refused():
    """They would silently be zero where a Function computes with detached tensors."""
    base, x = Base("nf4", 24, 16), leaf(2, 24)
    (dx,) = torch.autograd.grad(base_linear(x, base.base, *base.tensors).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_table_has_every_function():
    """A Function in inlay/ops that no case runs would escape these tests."""
    found = set()
    for file in sorted((Path(inlay.__file__).parent).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Function") for base in node.bases):
                found.add(node.name)
    run = set()
    makes = [
        lambda op=op, kind=kind: ON_A_BASE[op](kind, FEW)
        for op in ON_A_BASE
        for kind in ("dense", "nf4")
        if fits(op, kind)
    ]
    for make in [*makes, *WITHOUT_A_BASE.values()]:
        nodes = [y.grad_fn for y in make().ours()]
        while nodes:
            node = nodes.pop()
            run.add(type(node).__name__.removesuffix("Backward"))
            nodes += [below for below, _ in node.next_functions if below is not None]
    assert found and found <= run
