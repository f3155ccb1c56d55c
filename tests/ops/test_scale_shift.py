"""A scale and a shift per channel, against float64 and against plain torch."""

import pytest
import torch
from _compare import DTYPES, assert_as_good, assert_bits, grads, padded_rows, sorted_choice, strided, wide

from inlay import ops
from inlay.ops.scale_shift import scale_shift_backward, scale_shift_forward

SIZES = [(1, 1), (3, 7), (2, 113), (70, 203), (4, 2048), (0, 8)]
GIVEN = {"both": (True, True), "scale": (True, False), "shift": (False, True)}


def _eager(x, gamma, beta, channels=None):
    """In fp32 at least and cast once; autograd's gradients."""
    part = x if channels is None else x[..., channels]
    part = part if part.dtype == torch.float64 else part.float()
    part = part if gamma is None else part * gamma
    part = (part if beta is None else part + beta).to(x.dtype)
    return part if channels is None else x.index_copy(-1, channels, part)


def _numbers(size, given):
    values = torch.randn(2, size) + torch.tensor([[1.0], [0.0]])
    return [row.clone().requires_grad_() if wanted else None for row, wanted in zip(values, GIVEN[given], strict=True)]


def _compare(x, gamma, beta, channels):
    inputs = [t for t in (x, gamma, beta) if t is not None]
    doubles = [t.requires_grad_() for t in wide(*inputs)]
    pair = iter(doubles[1:])
    in_double = [None if t is None else next(pair) for t in (gamma, beta)]
    ours = ops.scale_shift(x, gamma, beta, channels)
    eager, exact = _eager(x, gamma, beta, channels), _eager(doubles[0], *in_double, channels)
    assert_as_good(ours, eager, exact, "forward")
    cotangent = torch.randn(x.shape).to(x.dtype)
    for i, (got, plain, wanted) in enumerate(
        zip(*(grads(y, of, [cotangent]) for y, of in ((ours, inputs), (eager, inputs), (exact, doubles))), strict=True)
    ):
        assert got.dtype == inputs[i].dtype
        assert_as_good(got, plain, wanted, f"gradient {i}", slack=4)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", SIZES)
def test_against_float64(path, dtype, rows, width, given):
    _compare((torch.randn(rows, width) * 3).to(dtype).requires_grad_(), *_numbers(width, given), None)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, chosen", [(7, 1), (113, 113), (203, 60), (40, 0)])
def test_chosen_channels(path, dtype, width, chosen, given):
    x, channels = (torch.randn(2, 35, width) * 3).to(dtype), sorted_choice(width, chosen)
    _compare(x.requires_grad_(), *_numbers(chosen, given), channels)
    y = ops.scale_shift(x, *_numbers(chosen, given), channels.int())
    others = torch.ones(width, dtype=torch.bool).index_fill(0, channels, False)
    assert_bits(y[..., others], x[..., others], "the other channels")


@pytest.mark.parametrize("given", GIVEN)
def test_other_channels_keep_zeros_and_infinities(path, given):
    x = torch.tensor([[0.0, -0.0, float("inf"), float("-inf"), 1e-45, 3.0]])
    y = ops.scale_shift(x, *_numbers(1, given), torch.tensor([5]))
    assert torch.equal(y[:, :5].view(torch.int32), x[:, :5].view(torch.int32))


@pytest.mark.parametrize("channels", [None, torch.tensor([0, 3, 4, 30])])
@pytest.mark.parametrize("make_view", [strided, padded_rows])
def test_views(path, make_view, channels):
    x, dy, size = torch.randn(70, 31).bfloat16(), torch.randn(70, 31).bfloat16(), 31 if channels is None else 4
    gamma, beta = torch.randn(size), torch.randn(size)
    kept = x if channels is None else x[:, channels]
    wanted = scale_shift_forward(x, gamma, beta, channels)
    assert_bits(scale_shift_forward(make_view(x), strided(gamma), strided(beta), channels), wanted)
    needs = (True, True, True)
    for got, want in zip(
        scale_shift_backward(make_view(dy), make_view(kept), strided(gamma), channels, *needs),
        scale_shift_backward(dy, kept, gamma, channels, *needs),
        strict=True,
    ):
        assert_bits(got, want)


@pytest.mark.parametrize("rows", [1, 63, 129, 5000])
def test_gradients_together_and_alone_have_the_same_bits(path, rows):
    x, dy, gamma = torch.randn(rows, 21).bfloat16(), torch.randn(rows, 21).bfloat16(), torch.randn(21)
    together = scale_shift_backward(dy, x, gamma, None, True, True, True)
    for i in range(3):
        alone = scale_shift_backward(dy, x if i == 1 else None, gamma, None, i == 0, i == 1, i == 2)
        assert_bits(alone[i], together[i], f"gradient {i}")
        assert all(alone[j].shape == (0,) for j in range(3) if j != i)
    exact = (dy.double() * x.double()).sum(0), dy.double().sum(0)
    plain = (dy.float() * x.float()).sum(0), dy.float().sum(0)
    for got, same_dtype, wanted in zip(together[1:], plain, exact, strict=True):
        assert_as_good(got, same_dtype, wanted, "sum", slack=2)


@pytest.mark.parametrize(
    "trained, channels, kept",
    [
        ("x gamma beta", None, [(4, 32), (32,)]),
        ("gamma", None, [(4, 32)]),
        ("x", None, [(32,)]),
        ("beta", None, []),
        ("x beta", None, [(32,)]),
        ("x gamma", [1, 5], [(4, 2), (2,), (2,)]),
        ("gamma", [1, 5], [(4, 2), (2,)]),
    ],
)
def test_keeps_only_what_a_gradient_takes(trained, channels, kept):
    size = 32 if channels is None else 2
    x, gamma, beta = torch.randn(4, 32).bfloat16(), torch.randn(size), torch.randn(size)
    for name, tensor in (("x", x), ("gamma", gamma), ("beta", beta)):
        tensor.requires_grad_(name in trained.split())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.scale_shift(x, gamma, beta, None if channels is None else torch.tensor(channels))
    assert sorted(tuple(t.shape) for t in saved) == sorted(kept)


def test_a_shift_alone_passes_the_gradient_on(path):
    x, beta = torch.randn(3, 5).bfloat16().requires_grad_(), torch.randn(5, requires_grad=True)
    cotangent = torch.randn(3, 5).bfloat16()
    dx, dbeta = grads(ops.scale_shift(x, beta=beta), [x, beta], [cotangent])
    assert_bits(dx, cotangent)
    torch.testing.assert_close(dbeta, cotangent.float().sum(0))


def test_numbers_stay_fp32_under_autocast(path):
    x, gamma = torch.randn(3, 5).bfloat16(), torch.randn(5, requires_grad=True)
    wanted = ops.scale_shift(x, gamma)
    with torch.autocast("cpu", torch.float16):
        assert_bits(ops.scale_shift(x, gamma), wanted)


def test_bad_input(path):
    x, gamma = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(ValueError, match="gamma, beta: wanted at least one"):
        ops.scale_shift(x)
    with pytest.raises(ValueError, match=r"gamma: wanted shape \(8,\)"):
        ops.scale_shift(x, torch.randn(7))
    with pytest.raises(ValueError, match=r"beta: wanted shape \(2,\)"):
        ops.scale_shift(x, gamma[:2], gamma, torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="beta: wanted torch.float32"):
        ops.scale_shift(x.bfloat16(), gamma, gamma.bfloat16())
    with pytest.raises(TypeError, match="indices: wanted int64"):
        ops.scale_shift(x, gamma[:2], None, torch.tensor([1.0, 2.0]))
    with pytest.raises((IndexError, RuntimeError)):  # the reference: as torch has it
        ops.scale_shift(x, gamma[:2], None, torch.tensor([1, 8]))
    with pytest.raises(ValueError, match="x: wanted the input"):
        scale_shift_backward(x, None, gamma, None, True, True, False)
    with pytest.raises(ValueError, match="gamma: wanted a scale"):
        scale_shift_backward(x, None, None, None, True, False, True)
