"""Attention with a soft cap of its scores and with sinks against float64: every form of span, odd sizes, decoding."""

import itertools
import sys

import pytest
import torch
from _compare import UNIT, assert_as_good, assert_bits, assert_threads_change_no_bit, grads, wide
from test_attention import SPANS, _case, _samples, _window

from inlay import _native, ops
from inlay.ops.attention import attention_backward, attention_forward, attention_sinks, mask_of

NAMES = ("dq", "dk", "dv", "dsinks")
KINDS = {"cap": (2.0, False), "sinks": (None, True), "both": (5.0, True)}


def _eager(q, k, v, spans, softcap, sinks, scale=None):
    """As transformers' Gemma 2 and GPT-OSS form it: scaled, capped, masked, a column of sinks that is dropped."""
    keys, values = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask_of(spans, q.shape[2], k.shape[2], q.device), -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        scores = torch.cat((scores, column), -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ values


def _sinks(heads, dtype=torch.float32, size=1.5):
    return (torch.randn(heads) * size).to(dtype).requires_grad_()


def _judge(case, spans=None, kind="both", atol=3e-6, scale=None, sink_dtype=torch.float32):
    """Our error is about that of the eager sum in the same dtype, for the output and every gradient."""
    (q, k, v, cotangent), (softcap, sunk) = case, KINDS[kind]
    leaves = [q, k, v, *([_sinks(q.shape[1], sink_dtype)] if sunk else [])]
    exact_leaves = [t.requires_grad_() for t in wide(*leaves)]

    def eager(leaves):
        return _eager(*leaves[:3], spans, softcap, leaves[3] if sunk else None, scale)

    ours = ops.attention(q, k, v, scale, spans, softcap, leaves[3] if sunk else None)
    exact, plain = eager(exact_leaves), eager(leaves)
    assert_as_good(ours, plain, exact, "output", slack=2)
    every = [grads(y, x, [cotangent]) for y, x in ((ours, leaves), (plain, leaves), (exact, exact_leaves))]
    for name, got, near, wanted in zip(NAMES, *every):
        assert got.dtype == near.dtype
        if name != "dsinks":  # P is formed again from a logsumexp in fp32, which costs as much as the sums
            assert_as_good(got, near, wanted, name, slack=8, atol=atol)
    if sunk:
        _judge_sinks(every[0][3], every[2][3], exact, cotangent, q.dtype)


def _judge_sinks(got, wanted, exact, cotangent, dtype):
    """Few numbers, whose terms cancel: the error is at most what rounding the output does to those terms."""
    terms = (exact.detach() * cotangent.double()).abs().sum((0, 2, 3))
    unit = max(UNIT[dtype], UNIT[got.dtype])
    allowed = 2 * unit * terms + 2 * UNIT[got.dtype] * wanted.abs()
    assert bool(((got.double() - wanted).abs() <= allowed).all()), f"dsinks: {got}, wanted {wanted} +- {allowed}"


SHAPES = [
    {},
    {"tokens": 1},
    {"tokens": 131},
    {"tokens": 300, "width": 64},
    {"heads": 3, "groups": 1},
    {"groups": 4, "width": 7},
    {"spread": 3.0},
    {"width": 96, "tokens": 65},
    {"width": 256, "tokens": 65, "heads": 2, "groups": 1},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(path, dtype, kind):
    for shape in SHAPES:
        # One token sees only itself, and without a sink dq and dk cancel to 0: the rounding of their terms is left.
        _judge(_case(dtype, **shape), kind=kind, atol=1e-2 if shape.get("tokens") == 1 else 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_spans_against_float64(path, dtype, kind):
    for name, (heads, groups, width) in itertools.product(SPANS, ((4, 2, 64), (3, 1, 33))):
        alone = name == "window of one"
        _judge(_case(dtype, 2, heads, groups, 150, width=width), SPANS[name], kind, 2e-2 if alone else 3e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_random_shapes(path, kind):
    """Samples of random lengths in one row, windows over them, groups and widths at random."""
    random = torch.Generator().manual_seed(3)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=random))

    for _ in range(6):
        groups, tokens = draw(1, 3), draw(2, 190)
        lengths = []
        while sum(lengths) < tokens:
            lengths.append(min(draw(1, 80), tokens - sum(lengths)))
        spans = _samples(tokens, *lengths)
        spans = torch.stack((torch.maximum(spans[..., 0], _window(tokens, draw(1, tokens))[..., 0]), spans[..., 1]), -1)
        case = _case(torch.float32, draw(1, 2), groups * draw(1, 4), groups, tokens, width=draw(1, 80))
        _judge(case, spans, kind, scale=draw(1, 9) / 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_goes_on_where_the_whole_was(path, kind, dtype):
    """One token, and a few at once, behind keys that were there before."""
    softcap, sunk = KINDS[kind]
    q, k, v, _ = _case(dtype, 2, 6, 2, 90)
    sinks = _sinks(6) if sunk else None
    with torch.no_grad():
        whole = ops.attention(q, k, v, softcap=softcap, sinks=sinks)
        for first, last in ((89, 90), (80, 90), (0, 1)):
            at = torch.arange(first, last)
            spans = torch.stack((torch.zeros_like(at), at + 1), -1)[None]
            part = [t[:, :, :last] for t in (k, v)]
            got = ops.attention(q[:, :, first:last], *part, spans=spans, softcap=softcap, sinks=sinks)
            rtol = 2e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got, whole[:, :, first:last], rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_of_any_dtype(path, dtype):
    for sink_dtype in (torch.float32, torch.bfloat16, torch.float16):
        _judge(_case(dtype), kind="sinks", sink_dtype=sink_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_in_shares(path, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["inlay.ops.attention"], "shares", lambda q, k: 3)
    _judge(_case(dtype, 1, 6, 2, 300))


def test_small_scores_keep_their_digits_under_a_wide_cap(path):
    """A cap far above all scores changes nothing: tanh(x) is x there, to the last digits."""
    q, k, v, cotangent = _case(torch.float32, tokens=70, spread=0.3)
    plain, capped = ops.attention(q, k, v), ops.attention(q, k, v, softcap=1e4)
    torch.testing.assert_close(capped, plain, rtol=1e-6, atol=1e-7)
    for got, wanted in zip(grads(capped, [q, k, v], [cotangent]), grads(plain, [q, k, v], [cotangent])):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_scores_far_beyond_the_cap(path):
    """All of them are the cap or its negative, nothing overflows, and no gradient reaches queries and keys."""
    q, k, v, cotangent = _case(torch.float32, tokens=70, spread=3e3)
    exact = _eager(*wide(q, k, v), None, 2.0, None)
    ours = ops.attention(q, k, v, softcap=2.0)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-1)
    dq, dk, dv = grads(ours, [q, k, v], [cotangent])
    assert dq.isfinite().all() and dk.isfinite().all() and dv.isfinite().all() and dv.abs().max() > 0


def test_a_sink_at_the_ends(path):
    """-inf is no sink, a large one takes everything."""
    q, k, v, cotangent = _case(torch.float32, heads=4, groups=2, tokens=70)
    plain = ops.attention(q, k, v)
    sinks = torch.tensor([-torch.inf, -torch.inf, 80.0, 80.0], requires_grad=True)
    ours = ops.attention(q, k, v, sinks=sinks)
    assert_bits(ours[:, :2], plain[:, :2])
    assert ours[:, 2:].abs().max() < 1e-20
    got = grads(ours, [q, k, v, sinks], [cotangent])
    assert all(g.isfinite().all() for g in got) and not got[3][:2].any()


def test_a_token_that_sees_nothing_but_its_sink(path):
    q, k, v, cotangent = _case(torch.float32, 1, tokens=70)
    sinks, at = _sinks(4), torch.arange(70)
    spans = torch.stack((at.clamp(max=60), (at + 1).clamp(max=60)), -1)[None]
    ours = ops.attention(q, k, v, spans=spans, sinks=sinks)
    assert not ours[:, :, 60:].any() and ours[:, :, :60].abs().amin(-1).all()
    dq, _, _, dsinks = grads(ours, [q, k, v, sinks], [cotangent])
    part = [t[:, :, :60].detach().requires_grad_() for t in (q, k, v)]
    alone = ops.attention(*part, spans=spans[:, :60], sinks=sinks)
    wanted = grads(alone, [*part, sinks], [cotangent[:, :, :60]])
    torch.testing.assert_close(dsinks, wanted[3])
    assert not dq[:, :, 60:].any()


def test_only_the_sinks_train(path):
    q, k, v, cotangent = _case(torch.float32)
    sinks, frozen = _sinks(4), [t.detach() for t in (q, k, v)]
    (got,) = grads(ops.attention(*frozen, sinks=sinks), [sinks], [cotangent])
    held = sinks.detach().double().requires_grad_()
    (wanted,) = grads(_eager(*wide(*frozen), None, None, held), [held], [cotangent.double()])
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_gradcheck_of_the_reference():
    q, k, v, _ = _case(torch.float64, 1, 4, 2, 9, width=5)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    # The kept logsumexp is fp32, whatever the inputs are.
    assert torch.autograd.gradcheck(
        lambda *t: ops.attention(*t[:3], softcap=1.5, sinks=t[3]), (q, k, v, sinks), eps=1e-4, atol=1e-4, rtol=1e-3
    )


def test_nan_in_nan_out(path):
    """Of the rows that see it, and of no others; a sink's, of its head."""
    q, k, v, _ = _case(torch.float32, 1, tokens=70)
    sinks = _sinks(4)
    with torch.no_grad():
        k[0, 0, 30, 3] = float("nan")
        out = ops.attention(q, k, v, softcap=3.0, sinks=sinks)
        assert out[0, :2, 30:].isnan().all() and not out[0, :2, :30].isnan().any() and not out[0, 2:].isnan().any()
        sinks[3] = float("nan")
        out = ops.attention(q, k, v, softcap=3.0, sinks=sinks)
    assert out[0, 3].isnan().all() and not out[0, 2].isnan().any()


@pytest.mark.skipif(not _native.available(), reason="the native module is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["inlay.ops.attention"], "shares", lambda q, k: 2)
    q, k, v, cotangent = _case(dtype, 1, 6, 2, 700, width=64)
    sinks = _sinks(6)

    def make():
        ours = ops.attention(q, k, v, softcap=4.0, sinks=sinks)
        return dict(zip(("out", *NAMES), (ours, *grads(ours, [q, k, v, sinks], [cotangent])), strict=True))

    assert_threads_change_no_bit(make)


def test_frozen_sinks_keep_no_tensor_more():
    q, k, v, _ = _case(torch.bfloat16)
    for sinks, count in ((_sinks(4).detach(), 5), (_sinks(4), 6)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            o = ops.attention(q, k, v, softcap=2.0, sinks=sinks)
        assert len({t.data_ptr() for t in saved}) == count and o.data_ptr() in {t.data_ptr() for t in saved}


def test_bad_input(path):
    q, k, v, cotangent = _case(torch.float32, heads=4, groups=2)
    for softcap in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="softcap: wanted a positive number"):
            ops.attention(q, k, v, softcap=softcap)
    with pytest.raises(ValueError, match="one for each head of q"):
        ops.attention(q, k, v, sinks=torch.zeros(2))
    with pytest.raises(TypeError, match="sinks: wanted"):
        ops.attention(q, k, v, sinks=torch.zeros(4).long())
    if path == "reference":
        return
    lse = torch.zeros(q.shape[:3])
    with pytest.raises(ValueError, match="sinks"):
        attention_forward(q, k, v, None, torch.zeros(3), 1.0, 0.0)
    with pytest.raises(ValueError, match="softcap"):
        attention_forward(q, k, v, None, None, 1.0, -1.0)
    with pytest.raises(ValueError, match="softcap"):
        attention_backward(cotangent, q, k, v, q, lse, None, 1.0, float("nan"))
    with pytest.raises(ValueError, match="lse"):
        attention_sinks(cotangent, q, lse[:1], torch.zeros(4))
