"""The submatrix delta by itself: all its ways to the same product, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close, assert_equal
from torch import nn

from inlay.bases import base_of
from inlay.pieces.linear import Delta, InPlaceSubmatrixDelta, SubmatrixDelta
from inlay.pieces.linear.submatrix import check_indices

SIDES = ["in", "out"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def parts(side, dtype=torch.float32, kind=SubmatrixDelta, rows=40, columns=24):
    linear = nn.Linear(columns, rows).to(dtype).requires_grad_(False)
    indices = torch.tensor([1, 3, 17, 20])
    delta = kind(linear.weight, indices, side)
    with torch.no_grad():
        delta.s2ft_values.add_(torch.randn_like(delta.s2ft_values))
    return linear, delta, torch.randn(2, 5, columns, dtype=dtype)


def dense(linear, delta, x):
    """base(x) + x·ΔWᵀ in float64."""
    weight = linear.weight.double() + delta.weight_delta().double()
    return nn.functional.linear(x.double(), weight, linear.bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_products_agree(side, dtype):
    linear, delta, x = parts(side, dtype)
    wanted = dense(linear, delta, x)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    one = delta.linear(x, base_of(linear), linear.weight, linear.bias)
    other = delta.after(linear(x), x)
    for y in (one, other):
        assert y.dtype is dtype
        assert_close(y, wanted, atol=tolerance, what="y")


@pytest.mark.parametrize("kind", [SubmatrixDelta, InPlaceSubmatrixDelta])
@pytest.mark.parametrize("side", SIDES)
def test_gradients_in_float64(side, kind):
    linear, delta, x = parts(side, torch.float64, kind)
    x.requires_grad_(True)

    def run(x, values):
        delta.s2ft_values.data = values.data  # what the module holds; autograd follows `values`
        return torch.func.functional_call(Wrapped(delta, linear), {"delta.s2ft_values": values}, (x,))

    assert torch.autograd.gradcheck(run, (x, delta.s2ft_values.detach().clone().requires_grad_(True)))


class Wrapped(nn.Module):
    def __init__(self, delta, linear):
        super().__init__()
        self.delta, self.linear = delta, linear

    def forward(self, x):
        return self.delta.linear(x, base_of(self.linear), self.linear.weight, self.linear.bias)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("kind", [SubmatrixDelta, InPlaceSubmatrixDelta])
@pytest.mark.parametrize("side", SIDES)
def test_gated_linear_is_the_linear_of_the_gated_product(side, kind, act):
    linear, delta, x = parts(side, kind=kind)
    gate, up = (torch.randn_like(x).requires_grad_(True) for _ in range(2))
    activation = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}[act]
    tensors = (gate, up, delta.s2ft_values)
    wanted = delta.linear(activation(gate) * up, base_of(linear), linear.weight, linear.bias)
    ours = delta.gated_linear(gate, up, act, base_of(linear), linear.weight, linear.bias)
    assert_close(ours, wanted, atol=1e-5, what="y")
    cotangent = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(ours, tensors, cotangent), torch.autograd.grad(wanted, tensors, cotangent)):
        assert_close(a, b, atol=1e-5 * float(b.abs().max()), what="gradient")


@pytest.mark.parametrize("kind", [SubmatrixDelta, InPlaceSubmatrixDelta])
@pytest.mark.parametrize("side", SIDES)
def test_weight_delta_and_factors(side, kind):
    linear, delta, _ = parts(side, kind=kind)
    whole = delta.weight_delta()
    a, b = delta.lora_factors()
    assert_equal(b @ a, whole, "B·A")
    assert a.shape == (4, 24) and b.shape == (40, 4)
    rows, columns = whole.nonzero(as_tuple=True)
    touched = columns if side == "in" else rows
    assert sorted(set(touched.tolist())) == [1, 3, 17, 20]
    assert delta.changes_anything() and not kind(linear.weight, torch.tensor([2]), side).changes_anything()


@pytest.mark.parametrize("side", SIDES)
def test_in_place_writes_and_restores(side):
    linear, delta, x = parts(side, torch.bfloat16, InPlaceSubmatrixDelta)
    original = linear.weight.clone()
    merged = delta.merge(linear.weight, None)[0]
    assert_equal(linear.weight, original, "merging makes a copy")
    delta.linear(x, base_of(linear), linear.weight, linear.bias)
    assert_equal(linear.weight, merged, "a forward writes")
    change = (merged != original).sum(1 if side == "out" else 0)
    assert change.nonzero().flatten().tolist() == [1, 3, 17, 20]
    delta.restore(linear.weight.data)
    assert_equal(linear.weight, original, "restored")
    with pytest.raises(RuntimeError, match="cannot be added to another adapter"):
        delta.after(linear(x), x)


@pytest.mark.parametrize(
    "indices, match",
    [
        ([], "wanted at least one channel"),
        ([0, 24], r"wanted channels in \[0, 24\), got 0..24"),
        ([-1, 3], r"wanted channels in \[0, 24\), got -1..3"),
        ([3, 5, 3], "wanted distinct channels, got 1 repeated"),
    ],
)
def test_indices_that_do_not_fit(indices, match):
    with pytest.raises(ValueError, match=f"here: {match}"):
        check_indices(torch.tensor(indices, dtype=torch.int64), 24, "here")


def test_indices_are_sorted_int64():
    assert check_indices(torch.tensor([5, 2, 9], dtype=torch.int32), 24, "here").tolist() == [2, 5, 9]
    for wrong in (torch.tensor([1.0]), torch.tensor([True, False])):
        with pytest.raises(ValueError, match="here: wanted whole channel numbers"):
            check_indices(wrong, 24, "here")
    with pytest.raises(ValueError, match='wanted side "in" or "out"'):
        SubmatrixDelta(torch.zeros(3, 3), torch.tensor([0]), "left")


def test_a_delta_that_lacks_a_method_cannot_be_made():
    class Half(Delta):
        def after(self, y, x):
            return y

    with pytest.raises(TypeError, match="abstract.*changes_anything.*weight_delta"):
        Half(4, 3)
