"""Gated activations against float64, and the rebuilt h[..., I] against the forward's bits."""

import pytest
import torch
from _compare import DTYPES, assert_as_good, assert_bits, grads, padded_rows, sorted_choice, strided, wide
from torch.nn import functional

from inlay import ops
from inlay.ops import DenseBase
from inlay.ops.swiglu import ACTIVATIONS, swiglu_backward, swiglu_forward

SIZES = [(1, 1), (3, 7), (2, 113), (5, 203), (4, 64), (0, 8)]
EAGER = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("rows, width", SIZES)
def test_against_float64(path, dtype, act, rows, width):
    gate, up = ((torch.randn(rows, width) * 4).to(dtype).requires_grad_() for _ in range(2))
    cotangent = torch.randn(rows, width).to(dtype)
    gate64, up64 = (t.requires_grad_() for t in wide(gate, up))
    exact = EAGER[act](gate64) * up64
    exact_grads = grads(exact, [gate64, up64], [cotangent])
    eager = EAGER[act](gate) * up
    eager_grads = grads(eager, [gate, up], [cotangent])
    ours = ops.swiglu(gate, up, act)
    assert_as_good(ours, eager, exact, "forward")
    for name, got, plain, wanted in zip(
        ("dgate", "dup"), grads(ours, [gate, up], [cotangent]), eager_grads, exact_grads, strict=True
    ):
        assert_as_good(got, plain, wanted, name, slack=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_rebuilt_channels_have_the_forwards_bits(path, dtype, act):
    gate, up, dh = ((torch.randn(9, 203) * 3).to(dtype) for _ in range(3))
    indices = sorted_choice(203, 41)
    h = swiglu_forward(gate, up, act)
    dgate, dup, h_sel = swiglu_backward(dh, gate, up, act, indices)
    assert_bits(h_sel, h[:, indices], "h[..., I]")
    none = swiglu_backward(dh, gate, up, act, None)
    assert_bits(none[0], dgate)
    assert_bits(none[1], dup)
    assert none[2].shape == (9, 0)


@pytest.mark.parametrize("make_view", [strided, padded_rows])
def test_views(path, make_view):
    gate, up, dh = ((torch.randn(4, 31) * 3).bfloat16() for _ in range(3))
    assert_bits(swiglu_forward(make_view(gate), make_view(up), "silu"), swiglu_forward(gate, up, "silu"))
    views = swiglu_backward(make_view(dh), make_view(gate), make_view(up), "silu", None)
    for got, wanted in zip(views, swiglu_backward(dh, gate, up, "silu", None), strict=True):
        assert_bits(got, wanted)


def test_extremes(path):
    """No overflow of the exponential may leak; NaN comes out as torch has it."""
    gate = torch.tensor([[-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30, float("nan")]])
    up = torch.ones_like(gate)
    for act in ACTIVATIONS:
        torch.testing.assert_close(
            swiglu_forward(gate, up, act), EAGER[act](gate), equal_nan=True, rtol=1e-6, atol=1e-30
        )


def _down_case(dtype):
    gate, up = ((torch.randn(2, 5, 37) * 2).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(11, 37) / 6).to(dtype), torch.randn(11).to(dtype)
    values = (torch.randn(11, 9) / 6).requires_grad_()
    return gate, up, values, sorted_choice(37, 9), weight, bias, torch.randn(2, 5, 11)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_down_projection_equals_unfused(path, dtype, in_place):
    gate, up, values, indices, weight, bias, cotangent = _down_case(dtype)
    stored = weight.clone()
    fused = ops.swiglu_submatrix_linear(gate, up, "silu", values, indices, DenseBase, stored, bias, in_place=in_place)
    unfused_op = ops.submatrix_linear_in_place if in_place else ops.submatrix_linear
    unfused = unfused_op(ops.swiglu(gate, up), values, indices, "in", DenseBase, weight.clone(), bias)
    assert_bits(fused, unfused, "forward")
    inputs = [gate, up, values]
    for name, got, wanted in zip(
        ("dgate", "dup", "dv"), grads(fused, inputs, [cotangent]), grads(unfused, inputs, [cotangent]), strict=True
    ):
        assert_bits(got, wanted, name)


def test_down_projection_without_delta(path):
    gate, up, _, _, weight, bias, cotangent = _down_case(torch.float32)
    fused = ops.swiglu_linear(gate, up, "gelu", DenseBase, weight, bias)
    eager = functional.linear(functional.gelu(gate) * up, weight, bias)
    torch.testing.assert_close(fused, eager)
    torch.testing.assert_close(grads(fused, [gate, up], [cotangent]), grads(eager, [gate, up], [cotangent]))


def test_earliest_layer_needs_no_input_gradient(path):
    """gate and up without gradient: only dv is formed, from h rebuilt at the chosen channels."""
    gate, up, values, indices, weight, bias, cotangent = _down_case(torch.bfloat16)
    full = ops.swiglu_submatrix_linear(gate, up, "silu", values, indices, DenseBase, weight, bias)
    part = ops.swiglu_submatrix_linear(gate.detach(), up.detach(), "silu", values, indices, DenseBase, weight, bias)
    assert_bits(grads(part, [values], [cotangent])[0], grads(full, [values], [cotangent])[0], "dv")


def test_h_is_never_saved():
    gate, up, values, indices, weight, bias, _ = _down_case(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.swiglu_submatrix_linear(gate, up, "silu", values, indices, DenseBase, weight, bias)
    kept = {t.data_ptr() for t in saved}
    assert kept == {t.data_ptr() for t in (gate, up, values, indices, weight, bias)}


def test_bad_input(path):
    gate = torch.randn(2, 8)
    with pytest.raises(ValueError, match="act: wanted one of"):
        ops.swiglu(gate, gate, "relu")
    with pytest.raises(TypeError, match="up: wanted torch.float32"):
        ops.swiglu(gate, gate.bfloat16())
    with pytest.raises(ValueError, match="up: wanted shape"):
        ops.swiglu(gate, gate[:, 1:])
