"""RMSNorm against float64 of the same rounded inputs."""

import pytest
import torch
from _compare import DTYPES, assert_as_good, assert_bits, grads, padded_rows, strided, wide

from inlay import ops
from inlay.ops.rms_norm import rms_norm_backward, rms_norm_forward

SIZES = [(1, 1), (3, 7), (2, 113), (5, 203), (4, 2048), (0, 8)]


def _eager(x, weight, eps, offset):
    """As transformers writes it (Gemma with offset 1): normalise in fp32 at least, scale, cast."""
    wide_x = x if x.dtype == torch.float64 else x.float()
    normed = wide_x * torch.rsqrt(wide_x.pow(2).mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * (offset + weight.to(normed.dtype))).to(x.dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", SIZES)
def test_against_float64(path, dtype, rows, width, offset):
    x = (torch.randn(rows, width) * 3).to(dtype).requires_grad_()
    weight = torch.randn(width).to(dtype).requires_grad_()
    cotangent = torch.randn(rows, width).to(dtype)
    x64, w64 = (t.requires_grad_() for t in wide(x, weight))
    exact = _eager(x64, w64, 1e-5, offset)
    eager = _eager(x, weight, 1e-5, offset)
    ours = ops.rms_norm(x, weight, 1e-5, offset)
    assert_as_good(ours, eager, exact, "forward", slack=4)
    for name, got, plain, wanted in zip(
        ("dx", "dweight"),
        grads(ours, [x, weight], [cotangent]),
        grads(eager, [x, weight], [cotangent]),
        grads(exact, [x64, w64], [cotangent]),
        strict=True,
    ):
        # One channel is its own mean: dx cancels to about eps, and only the rounding of its terms is left.
        assert_as_good(got, plain, wanted, name, slack=8, atol=1e-6 if width == 1 else 1e-30)


def test_no_weight_and_fp32_weight(path):
    x = torch.randn(3, 65).bfloat16()
    assert_bits(ops.rms_norm(x, None, 1e-6), ops.rms_norm(x, torch.ones(65), 1e-6))
    assert ops.rms_norm(x, torch.ones(65), 1e-6).dtype == torch.bfloat16


@pytest.mark.parametrize("make_view", [strided, padded_rows])
def test_views(path, make_view):
    x, weight = torch.randn(4, 31).bfloat16(), torch.randn(31)
    wanted = rms_norm_forward(x, weight, 1e-5, 0.0)
    for got, want in zip(rms_norm_forward(make_view(x), strided(weight), 1e-5, 0.0), wanted, strict=True):
        assert_bits(got, want)


def _backward_case(rows, width, dtype=torch.bfloat16):
    x, dy = (torch.randn(rows, width).to(dtype) for _ in range(2))
    return dy, x, torch.randn(width), rms_norm_forward(x, None, 1e-5, 0.0)[1], 0.0


@pytest.mark.parametrize("rows", [1, 63, 129, 5000])
def test_gradients_together_and_alone_have_the_same_bits(path, rows):
    """One pass for both, and dweight in the weight's dtype: sums over many rows lose nothing."""
    case = _backward_case(rows, 37)
    dx, dweight = rms_norm_backward(*case, True, True)
    assert_bits(rms_norm_backward(*case, True, False)[0], dx, "dx")
    assert_bits(rms_norm_backward(*case, False, True)[1], dweight, "dweight")
    exact = (case[0].double() * case[1].double() * case[3].double()[:, None]).sum(0)
    plain = (case[0].float() * case[1].float() * case[3][:, None]).sum(0)
    assert dweight.dtype == torch.float32
    assert_as_good(dweight, plain, exact, "dweight", slack=2)


@pytest.mark.parametrize("make_view", [strided, padded_rows])
def test_backward_of_views(path, make_view):
    dy, x, weight, rstd, offset = _backward_case(70, 31)
    wanted = rms_norm_backward(dy, x, weight, rstd, offset, True, True)
    got = rms_norm_backward(make_view(dy), make_view(x), strided(weight), rstd, offset, True, True)
    for one, other in zip(got, wanted, strict=True):
        assert_bits(one, other)


def test_only_what_is_asked_for_is_computed(path):
    x, weight = torch.randn(5, 8), torch.randn(8, requires_grad=True)
    y = ops.rms_norm(x, weight, 1e-5)  # the input of the first trained block needs no gradient
    (alone,) = torch.autograd.grad(y.sum(), weight)
    both = torch.autograd.grad(ops.rms_norm(x.requires_grad_(), weight, 1e-5).sum(), (weight, x))
    assert_bits(alone, both[0])
    nothing = rms_norm_backward(x, x, None, torch.rand(5), 0.0, True, False)[1]
    assert nothing.shape == (0,)


@pytest.mark.parametrize("trained", [False, True])
def test_keeps_x_and_rstd_only(trained):
    x, weight = torch.randn(4, 32).bfloat16().requires_grad_(), torch.randn(32).bfloat16().requires_grad_(trained)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.rms_norm(x, weight, 1e-5)
    shapes = sorted((tuple(t.shape), t.dtype) for t in saved if t.data_ptr() != weight.data_ptr())
    assert shapes == [((4,), torch.float32), ((4, 32), torch.bfloat16)]


def test_bad_input(path):
    with pytest.raises(ValueError, match="weight: wanted shape"):
        ops.rms_norm(torch.randn(2, 8), torch.randn(7), 1e-5)
    with pytest.raises(ValueError, match="weight: wanted a weight, since its gradient"):
        rms_norm_backward(torch.randn(2, 8), torch.randn(2, 8), None, torch.rand(2), 0.0, True, True)
    with pytest.raises(TypeError, match="x: wanted a float32"):
        ops.rms_norm(torch.ones(2, 8, dtype=torch.int64), None, 1e-5)
