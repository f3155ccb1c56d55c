"""Grouped-query attention over stretches of keys against float64; odd sizes, several blocks, large scores."""

import sys

import pytest
import torch
from _compare import assert_as_good, assert_bits, assert_threads_change_no_bit, grads, wide
from torch.nn import functional

from inlay import _native, ops
from inlay.ops.attention import attention_backward, attention_forward, mask_of

NAMES = ("dq", "dk", "dv")


def _eager(q, k, v, scale=None, spans=None):
    repeat = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeat, 1) for t in (k, v))
    mask = mask_of(spans, q.shape[2], k.shape[2], q.device)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _case(dtype, batch=2, heads=4, groups=2, tokens=37, keys=None, width=32, spread=1.0):
    def make(count, rows):
        x = torch.randn(batch, rows, count, width) * spread
        return x.to(dtype).transpose(1, 2).requires_grad_()

    made = make(heads, tokens), make(groups, keys or tokens), make(groups, keys or tokens)
    return *made, torch.randn(batch, heads, tokens, width).to(dtype)


def _judge(q, k, v, cotangent, spans=None, atol=1e-6):
    wide_inputs = [t.requires_grad_() for t in wide(q, k, v)]
    exact, eager = _eager(*wide_inputs, spans=spans), _eager(q, k, v, spans=spans)
    ours = ops.attention(q, k, v, spans=spans)
    assert_as_good(ours, eager, exact, "output")
    for name, got, plain, wanted in zip(
        NAMES,
        grads(ours, [q, k, v], [cotangent]),
        grads(eager, [q, k, v], [cotangent]),
        grads(exact, wide_inputs, [cotangent]),
        strict=True,
    ):
        assert_as_good(got, plain, wanted, name, slack=2, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tokens": 1},
        {"tokens": 131},
        {"tokens": 300, "width": 64},
        {"heads": 3, "groups": 1},  # rows of three heads to a token
        {"groups": 4},
        {"spread": 3.0},
        {"width": 96, "tokens": 64},
        {"width": 7},
        {"width": 40, "tokens": 70},
        {"width": 256, "tokens": 65, "heads": 2, "groups": 1},
    ],
)
def test_against_float64(path, dtype, shape):
    # One token sees only itself: dq and dk cancel to 0, and the rounding of their terms is left.
    _judge(*_case(dtype, **shape), atol=1e-2 if shape.get("tokens") == 1 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_keys_in_shares(path, dtype, count, monkeypatch):
    """Also more shares than there are blocks of keys for."""
    monkeypatch.setattr(sys.modules["inlay.ops.attention"], "shares", lambda q, k: count)
    _judge(*_case(dtype, 1, 6, 2, 300))
    _judge(*_case(dtype, 1, 6, 2, 300), _window(300, 30))


def _samples(tokens, *lengths):
    """Causal samples one after the other."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    at = torch.arange(tokens)
    return torch.stack((starts[torch.searchsorted(starts, at, right=True) - 1], at + 1), -1)[None]


def _window(tokens, size):
    at = torch.arange(tokens)
    return torch.stack(((at - size + 1).clamp(min=0), at + 1), -1)[None]


def _padded(tokens, *lengths):
    """As a causal mask and a padding mask say together: what is beyond a row's length sees all of the row."""
    ends = torch.minimum(torch.arange(1, tokens + 1), torch.tensor(lengths)[:, None])
    return torch.stack((torch.zeros_like(ends), ends), -1)


def _all_of(tokens, *lengths):
    """Both directions, each row of its own length."""
    return torch.tensor([[0, length] for length in lengths])[:, None].expand(-1, tokens, -1).contiguous()


SPANS = {
    "samples": _samples(150, 40, 1, 61, 48),
    "window": _window(150, 20),
    "window of one": _window(150, 1),
    "padded": _padded(150, 150, 61),
    "both directions": _all_of(150, 150, 97),
    "ahead": torch.stack((torch.arange(150) // 2, (torch.arange(150) + 90).clamp(max=150)), -1)[None],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPANS)
def test_spans_against_float64(path, dtype, name):
    for heads, groups, width in ((4, 2, 64), (3, 1, 33)):
        alone = name == "window of one"
        _judge(*_case(dtype, 2, heads, groups, 150, width=width), SPANS[name], atol=2e-2 if alone else 1e-6)


def test_other_keys_than_queries(path):
    ends = (torch.arange(50) + 161).clamp(max=200)
    _judge(*_case(torch.bfloat16, tokens=50, keys=200), torch.stack((ends // 3, ends), -1)[None])


def test_a_token_that_sees_nothing_is_zero(path):
    q, k, v, cotangent = _case(torch.float32, 1, tokens=70)
    at = torch.arange(70)
    spans = torch.stack((at.clamp(min=5, max=60), (at + 1).clamp(min=5, max=60)), -1)[None]
    empty = (at < 5) | (at >= 60)
    ours = ops.attention(q, k, v, spans=spans)
    assert not ours[:, :, empty].any() and ours[:, :, ~empty].abs().amin(-1).all()
    got = grads(ours, [q, k, v], [cotangent])
    some = [t[:, :, 5:60].detach().requires_grad_() for t in (q, k, v)]
    wanted = grads(ops.attention(*some, spans=_window(55, 1)), some, [cotangent[:, :, 5:60]])
    for name, grad, part in zip(NAMES, got, wanted, strict=True):
        torch.testing.assert_close(grad[:, :, 5:60], part, rtol=1e-4, atol=1e-4, msg=name)
        assert not grad[:, :, empty].any()


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
def test_scale(path, scale):
    q, k, v, cotangent = _case(torch.float32)
    ours = grads(ops.attention(q, k, v, scale), [q, k, v], [cotangent])
    torch.testing.assert_close(ours, grads(_eager(q, k, v, scale), [q, k, v], [cotangent]), rtol=1e-4, atol=1e-5)


def test_expanded_cotangent_and_contiguous_inputs(path):
    q, k, v, _ = _case(torch.bfloat16)
    wanted = grads(ops.attention(q, k, v), [q, k, v], [torch.ones(2, 4, 37, 32)])
    dense = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
    ones = torch.ones((), dtype=q.dtype).expand(2, 4, 37, 32)
    for name, got, want in zip(NAMES, grads(ops.attention(*dense), dense, [ones]), wanted, strict=True):
        assert_bits(got, want, name)


@pytest.mark.skipif(not _native.available(), reason="the native module is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["inlay.ops.attention"], "shares", lambda q, k: 2)
    q, k, v, cotangent = _case(dtype, 1, 6, 2, 700, width=64)

    def make():
        ours = ops.attention(q, k, v)
        return dict(zip(("out", *NAMES), (ours, *grads(ours, [q, k, v], [cotangent])), strict=True))

    assert_threads_change_no_bit(make)


def test_nan_in_nan_out(path):
    """Of the rows that see it, and of no others."""
    q, k, v, _ = _case(torch.float32, 1, tokens=70)
    with torch.no_grad():
        k[0, 0, 30, 3] = float("nan")
        out = ops.attention(q, k, v)
    assert out[0, :2, 30:].isnan().all() and not out[0, :2, :30].isnan().any() and not out[0, 2:].isnan().any()


def test_keeps_five_tensors():
    q, k, v, _ = _case(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        o = ops.attention(q, k, v)
    assert len({t.data_ptr() for t in saved}) == 5 and o.data_ptr() in {t.data_ptr() for t in saved}


def test_bad_input(path):
    q, k, v, cotangent = _case(torch.float32, heads=4, groups=2)
    with pytest.raises(ValueError, match="multiple of Hk"):
        ops.attention(q[:, :3], k, v)
    with pytest.raises(TypeError, match="k: wanted"):
        ops.attention(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="pass spans"):
        ops.attention(q[:, :, :9], k, v)
    with pytest.raises(ValueError, match="int64"):
        ops.attention(q, k, v, spans=_window(36, 3))
    if path == "reference":
        return
    for spans in (_window(37, 3).flip(1), _window(37, 3) + 1, _window(37, 3) - 1, _window(37, 3).flip(2)):
        with pytest.raises(ValueError, match="neither falling"):
            attention_forward(q, k, v, spans, None, 1.0, 0.0)
        with pytest.raises(ValueError, match="neither falling"):
            attention_backward(cotangent, q, k, v, q, torch.zeros(q.shape[:3]), spans, 1.0, 0.0)
