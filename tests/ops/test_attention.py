"""Causal grouped-query attention against float64; odd sizes, several blocks, large scores."""

import pytest
import torch
from _compare import assert_as_good, assert_bits, grads, wide
from torch.nn import functional

from inlay import ops

NAMES = ("dq", "dk", "dv")


def _eager(q, k, v, scale=None):
    repeat = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeat, 1) for t in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _case(dtype, batch=2, heads=4, groups=2, tokens=37, width=32, spread=1.0):
    def make(count):
        x = torch.randn(batch, tokens, count, width) * spread
        return x.to(dtype).transpose(1, 2).requires_grad_()

    return make(heads), make(groups), make(groups), torch.randn(batch, heads, tokens, width).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tokens": 1},
        {"tokens": 131},
        {"tokens": 300, "width": 64},
        {"heads": 3, "groups": 1},
        {"groups": 4},
        {"spread": 3.0},
        {"width": 96, "tokens": 64},
        {"width": 7},
    ],
)
def test_against_float64(path, dtype, shape):
    q, k, v, cotangent = _case(dtype, **shape)
    wide_inputs = [t.requires_grad_() for t in wide(q, k, v)]
    exact, eager, ours = _eager(*wide_inputs), _eager(q, k, v), ops.attention(q, k, v)
    assert_as_good(ours, eager, exact, "output")
    # One token sees only itself: dq and dk cancel to 0, and the rounding of their terms is left.
    for name, got, plain, wanted in zip(
        NAMES,
        grads(ours, [q, k, v], [cotangent]),
        grads(eager, [q, k, v], [cotangent]),
        grads(exact, wide_inputs, [cotangent]),
        strict=True,
    ):
        assert_as_good(got, plain, wanted, name, slack=2, atol=1e-2 if q.shape[2] == 1 else 1e-6)


def test_scale(path):
    q, k, v, cotangent = _case(torch.float32)
    ours = grads(ops.attention(q, k, v, 0.3), [q, k, v], [cotangent])
    torch.testing.assert_close(ours, grads(_eager(q, k, v, 0.3), [q, k, v], [cotangent]), rtol=1e-4, atol=1e-5)


def test_expanded_cotangent_and_contiguous_inputs(path):
    q, k, v, _ = _case(torch.bfloat16)
    wanted = grads(ops.attention(q, k, v), [q, k, v], [torch.ones(2, 4, 37, 32)])
    dense = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
    ones = torch.ones((), dtype=q.dtype).expand(2, 4, 37, 32)
    for name, got, want in zip(NAMES, grads(ops.attention(*dense), dense, [ones]), wanted, strict=True):
        assert_bits(got, want, name)


def test_keeps_five_tensors():
    q, k, v, _ = _case(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        o = ops.attention(q, k, v)
    assert len({t.data_ptr() for t in saved}) == 5 and o.data_ptr() in {t.data_ptr() for t in saved}


def test_bad_input(path):
    q, k, v, _ = _case(torch.float32, heads=4, groups=2)
    with pytest.raises(ValueError, match="multiple of Hk"):
        ops.attention(q[:, :3], k, v)
    with pytest.raises(TypeError, match="k: wanted"):
        ops.attention(q, k.bfloat16(), v)
