"""The causal convolution against torch's own in float64: samples shorter than the taps, spans of tokens, odd widths."""

import pytest
import torch
from _compare import assert_as_good, assert_bits, assert_threads_change_no_bit, grads, wide
from torch.nn import functional

from inlay import _native, ops
from inlay.ops._registry import RAW_OPS
from inlay.ops.causal_conv1d import causal_conv1d_backward

NAMES = ("dx", "dweight", "dbias")


def plain(x, weight, bias=None, silu=True):
    """As transformers' fallback does it."""
    z = functional.conv1d(x.mT.to(weight.dtype), weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[2])
    z = z[..., : x.shape[1]].mT
    return (functional.silu(z) if silu else z).to(x.dtype)


def case(dtype, batch=2, tokens=70, channels=37, taps=4, biased=True, taps_dtype=None):
    x = torch.randn(batch, tokens, channels).to(dtype).requires_grad_()
    made = [torch.randn(channels, taps), *([torch.randn(channels)] if biased else [])]
    made = [t.to(taps_dtype or dtype).requires_grad_() for t in made]
    return [x, *made], [torch.randn(batch, tokens, channels).to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tokens": 1},
        {"tokens": 3, "taps": 4},
        {"tokens": 64},
        {"tokens": 65, "channels": 300},
        {"tokens": 200, "batch": 1, "channels": 8},
        {"taps": 1},
        {"taps": 9},
        {"biased": False},
        {"channels": 1},
    ],
)
def test_against_float64(path, dtype, silu, shape):
    inputs, cotangents = case(dtype, **shape)
    exact_inputs = [t.requires_grad_() for t in wide(*inputs)]
    outputs = [f(*x, silu=silu) for f, x in ((ops.causal_conv1d, inputs), (plain, inputs), (plain, exact_inputs))]
    assert_as_good(*outputs, "output", slack=2, atol=1e-6)
    found = [grads(o, x, cotangents) for o, x in zip(outputs, (inputs, inputs, exact_inputs), strict=True)]
    for name, *each in zip(NAMES, *found, strict=False):
        assert_as_good(*each, name, slack=4, atol=1e-5)


def test_taps_of_another_dtype(path):
    inputs, cotangents = case(torch.bfloat16, taps_dtype=torch.float32)
    y = ops.causal_conv1d(*inputs)
    assert y.dtype == torch.bfloat16 and [g.dtype for g in grads(y, inputs, cotangents)] == [t.dtype for t in inputs]
    exact = plain(*wide(*inputs))
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


def test_rows_apart_and_channels_apart(path):
    """Rows of a wider projection, and what a cache hands back, whose tokens are neighbours."""
    inputs, cotangents = case(torch.bfloat16)
    wanted = grads(ops.causal_conv1d(*inputs), inputs, cotangents)
    x = inputs[0].detach()
    wider = torch.cat((torch.full_like(x, float("nan")), x, x), -1)[..., 37:74]
    for given in (wider, x.mT.contiguous().mT):
        leaves = [given.requires_grad_(), *inputs[1:]]
        for name, got, want in zip(NAMES, grads(ops.causal_conv1d(*leaves), leaves, cotangents), wanted, strict=True):
            assert_bits(got, want, name)


def test_later_tokens_change_nothing_before(path):
    (x, weight, bias), _ = case(torch.float32)
    with torch.no_grad():
        before = ops.causal_conv1d(x, weight, bias)
        x[:, 30:] = float("nan")
        assert_bits(ops.causal_conv1d(x, weight, bias)[:, :30], before[:, :30])


def test_gradcheck():
    inputs = [t.detach().double().requires_grad_() for t in case(torch.float64, 2, 5, 3)[0]]
    for silu in (True, False):
        assert torch.autograd.gradcheck(lambda *x, silu=silu: ops.causal_conv1d(*x, silu=silu), inputs)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_what_is_not_needed_is_not_formed(path, needs):
    (x, weight, bias), (dy,) = case(torch.bfloat16)
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    grads = causal_conv1d_backward(dy, x, weight, bias, True, *needs)
    wanted = causal_conv1d_backward(dy, x, weight, bias, True, True, True)
    assert_bits(grads[0], wanted[0] if needs[0] else x.new_empty(0))
    for got, want in zip(grads[1:], wanted[1:], strict=True):
        assert_bits(got, want if needs[1] else x.new_empty(0))


@pytest.mark.parametrize("tokens, batch", [(0, 2), (3, 0)])
def test_nothing(path, tokens, batch):
    inputs, cotangents = case(torch.float32, batch, tokens)
    y = ops.causal_conv1d(*inputs)
    dx, dweight, dbias = grads(y, inputs, cotangents)
    assert y.shape == dx.shape == (batch, tokens, 37) and not dweight.any() and not dbias.any()


@pytest.mark.skipif(not _native.available(), reason="the native module is not built")
def test_threads_change_no_bit():
    inputs, cotangents = case(torch.bfloat16, 2, 300, 700)

    def make():
        y = ops.causal_conv1d(*inputs)
        return dict(zip(("y", *NAMES), (y, *grads(y, inputs, cotangents)), strict=True))

    assert_threads_change_no_bit(make)


@pytest.mark.parametrize("biased", [True, False])
def test_opcheck(path, biased):
    inputs, (dy,) = case(torch.bfloat16, 1, 5, 3, biased=biased)
    inputs = [t.detach() for t in inputs] + ([] if biased else [None])
    torch.library.opcheck(RAW_OPS["causal_conv1d_forward"].overload, (*inputs, True))
    torch.library.opcheck(RAW_OPS["causal_conv1d_backward"].overload, (dy, *inputs, True, True, True))


def test_bad_input(path):
    (x, weight, bias), _ = case(torch.float32)
    with pytest.raises(ValueError, match="channels last"):
        ops.causal_conv1d(x.mT, weight, bias)
    with pytest.raises(ValueError, match="one number per channel"):
        ops.causal_conv1d(x, weight, bias[:3])
    with pytest.raises(TypeError, match="bias: wanted"):
        ops.causal_conv1d(x, weight, bias.bfloat16())
    with pytest.raises(TypeError, match="x: wanted"):
        ops.causal_conv1d(x.long(), weight)
