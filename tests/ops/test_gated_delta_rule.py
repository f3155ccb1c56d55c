"""The gated delta rule against its recurrence in float64: odd sizes, several chunks, grouped heads, states, decays."""

import pytest
import torch
from _compare import assert_as_good, assert_bits, assert_threads_change_no_bit, grads, wide
from transformers.models.qwen3_next import modeling_qwen3_next

from inlay import _native, ops
from inlay.ops._registry import RAW_OPS
from inlay.ops.gated_delta_rule import has_own_kernel

NAMES = ("dq", "dk", "dv", "dg", "dbeta", "dstate")
EPS = 1e-6


def recurrent(q, k, v, g, beta, state=None, scale=None, norm_eps=None):
    """Equation 10 of arXiv:2412.06464, token by token."""
    if norm_eps is not None:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + norm_eps) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q * scale, k))
    state = q.new_zeros(q.shape[0], v.shape[2], q.shape[3], v.shape[3]) if state is None else state
    outs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None, None] * state
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - held))
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outs, 1), state


def chunked(q, k, v, g, beta, state=None, norm_eps=None):
    """transformers' own fallback, in the dtypes given."""
    rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
    out, last = rule(q, k, v, g, beta, 64, state, True, norm_eps is not None)
    return out, last


def case(dtype, batch=2, tokens=37, groups=2, heads=4, keys=16, values=24, decay=0.3, most=1.0, state=True):
    q, k = (torch.randn(batch, tokens, groups, keys).to(dtype) for _ in range(2))
    v = torch.randn(batch, tokens, heads, values).to(dtype)
    g, beta = -decay * torch.rand(batch, tokens, heads), most * torch.rand(batch, tokens, heads)
    states = [torch.randn(batch, heads, keys, values)] if state else []
    inputs = [t.requires_grad_() for t in (q, k, v, g, beta, *states)]
    return inputs, [torch.randn(v.shape).to(dtype), torch.randn(batch, heads, keys, values)]


def judge(inputs, cotangents, norm_eps=EPS, atol=1e-6):
    exact_inputs = [t.requires_grad_() for t in wide(*inputs)]
    outputs = [f(*x, norm_eps=norm_eps) for f, x in ((ops.gated_delta_rule, inputs), (chunked, inputs))]
    outputs.append(recurrent(*exact_inputs, norm_eps=norm_eps))
    for name, *each in zip(("out", "state"), *outputs, strict=True):
        assert_as_good(*each, name, slack=2, atol=atol)
    found = [grads(o, x, cotangents) for o, x in zip(outputs, (inputs, inputs, exact_inputs), strict=True)]
    for name, ours, plain, exact in zip(NAMES, *found, strict=False):
        assert_as_good(ours, plain, exact, name, slack=4, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"state": False},
        {"tokens": 1},
        {"tokens": 64},
        {"tokens": 65, "groups": 1, "heads": 3},
        {"tokens": 200, "batch": 1},
        {"groups": 4},
        {"keys": 7, "values": 5, "tokens": 70},
        {"keys": 33, "values": 130, "tokens": 66, "batch": 1},
        {"keys": 1, "values": 1},
        {"decay": 30.0, "tokens": 130},
        {"decay": 0.0, "tokens": 130},
        {"most": 2.0, "tokens": 70},  # OLMo Hybrid's: eigenvalues down to -1
    ],
)
def test_against_float64(path, dtype, shape):
    # One token: dg and dstate of it cancel against nothing larger than themselves.
    judge(*case(dtype, **shape), atol=1e-2 if shape.get("keys") == 1 else 1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_rows_as_they_are(path, tokens):
    """Without norms: keys of length about 1, as the rule wants them."""
    inputs, cotangents = case(torch.float32, tokens=tokens)
    with torch.no_grad():
        inputs[1].mul_(inputs[1].shape[-1] ** -0.5)
    judge(inputs, cotangents, norm_eps=None)


def test_the_width_that_models_have(path):
    judge(*case(torch.bfloat16, 1, 130, 1, 2, 128, 128), atol=1e-5)


@pytest.mark.parametrize("norm_eps", [None, EPS])
def test_float64_is_the_recurrence(norm_eps):
    """The reference's own gradients, to the last digits."""
    inputs, cotangents = case(torch.float64, 1, 131, 2, 4, 6, 5)
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    with torch.no_grad():
        inputs[1].mul_(0.3)
    ours, exact = (f(*inputs, norm_eps=norm_eps) for f in (ops.gated_delta_rule, recurrent))
    pairs = zip((*ours, *grads(ours, inputs, cotangents)), (*exact, *grads(exact, inputs, cotangents)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    inputs, _ = case(torch.float64, 1, 4, 1, 2, 3, 2)
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *x: ops.gated_delta_rule(*x, norm_eps=EPS), inputs)


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_alone(path, which):
    """The state's gradient without the output's, and the other way round."""
    inputs, cotangents = case(torch.float32, tokens=70)
    ours, plain = (f(*inputs, norm_eps=EPS)[which] for f in (ops.gated_delta_rule, recurrent))
    found = [torch.autograd.grad(y, inputs, cotangents[which], allow_unused=True) for y in (ours, plain)]
    for name, got, wanted in zip(NAMES, *found, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted, rtol=1e-4, atol=1e-5)
        assert bool(got.any()) or which == 1, name


def test_in_pieces(path):
    """A state handed on is as good as one run."""
    inputs, _ = case(torch.float32, tokens=150)
    with torch.no_grad():
        whole, last = ops.gated_delta_rule(*inputs, norm_eps=EPS)
        state, outs = inputs[5], []
        for begin, end in ((0, 64), (64, 65), (65, 150)):
            out, state = ops.gated_delta_rule(*(t[:, begin:end] for t in inputs[:5]), state, norm_eps=EPS)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_later_tokens_change_nothing_before(path):
    inputs, _ = case(torch.float32, tokens=90)
    with torch.no_grad():
        before = ops.gated_delta_rule(*inputs)[0]
        for t in inputs[:5]:
            t[:, 80:] = torch.randn_like(t[:, 80:])
        after = ops.gated_delta_rule(*inputs)[0]
    assert_bits(after[:, :80], before[:, :80])
    assert not torch.equal(after[:, 80:], before[:, 80:])


def test_strided_inputs(path):
    """Views of one projection, and rows whose elements lie apart."""
    inputs, cotangents = case(torch.bfloat16, tokens=70, groups=4, values=16)
    wanted = grads(ops.gated_delta_rule(*inputs), inputs, cotangents)
    packed = torch.cat([t.detach() for t in inputs[:3]], -1)
    views = [t.requires_grad_() for t in packed.detach().split(16, -1)]
    apart = inputs[2].detach().mT.contiguous().mT.requires_grad_()
    for given in (views, [*views[:2], apart]):
        given = [*given, *inputs[3:]]
        for name, got, want in zip(NAMES, grads(ops.gated_delta_rule(*given), given, cotangents), wanted, strict=True):
            assert_bits(got, want, name)


def test_no_tokens(path):
    inputs, cotangents = case(torch.float32, tokens=0)
    out, last = ops.gated_delta_rule(*inputs, norm_eps=EPS)
    assert out.shape == (2, 0, 4, 24) and torch.equal(last, inputs[5])
    assert torch.equal(grads((out, last), inputs, cotangents)[5], cotangents[1])


@pytest.mark.skipif(not _native.available(), reason="the native module is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype):
    inputs, cotangents = case(dtype, 2, 150, 3, 6, 64, 64)

    def make():
        ours = ops.gated_delta_rule(*inputs, norm_eps=EPS)
        return dict(zip(("out", "state", *NAMES), (*ours, *grads(ours, inputs, cotangents)), strict=True))

    assert_threads_change_no_bit(make)


def test_keeps_its_inputs_alone():
    inputs, _ = case(torch.bfloat16, tokens=130)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.gated_delta_rule(*inputs, norm_eps=EPS)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in inputs}


@pytest.mark.parametrize("state", [True, False])
def test_opcheck(path, state):
    inputs, cotangents = case(torch.bfloat16, 1, 5, 1, 2, 4, 3, state=state)
    inputs = [t.detach() for t in inputs] + ([] if state else [None])
    rest = (0.5, True, EPS)
    torch.library.opcheck(RAW_OPS["gated_delta_rule_forward"].overload, (*inputs, *rest))
    torch.library.opcheck(RAW_OPS["gated_delta_rule_backward"].overload, (*cotangents, *inputs, *rest))


def test_where_the_kernel_runs():
    """On CPUs with vectors: loops of scalars are no match for torch's products."""
    wanted = _native.available() and _native.module().isa() != "scalar"
    assert has_own_kernel(torch.zeros(1)) == wanted
    assert not has_own_kernel(torch.zeros(1).double()) and not has_own_kernel(torch.zeros(1, device="meta"))
    if _native.available():
        _native.module().set_isa("scalar")
        try:
            assert not has_own_kernel(torch.zeros(1))
        finally:
            _native.module().set_isa("")


def test_bad_input(path):
    (q, k, v, g, beta, state), _ = case(torch.float32)
    with pytest.raises(ValueError, match="H a multiple of G"):
        ops.gated_delta_rule(q, k, v[:, :, :3], g, beta)
    with pytest.raises(TypeError, match="v: wanted"):
        ops.gated_delta_rule(q, k, v.bfloat16(), g, beta)
    with pytest.raises(ValueError, match="one number per token"):
        ops.gated_delta_rule(q, k, v, g[:, :3], beta)
    with pytest.raises(TypeError, match="beta: wanted"):
        ops.gated_delta_rule(q, k, v, g, beta.long())
    with pytest.raises(ValueError, match=r"\[B, H, dk, dv\]"):
        ops.gated_delta_rule(q, k, v, g, beta, state.mT)


@pytest.mark.skipif(not _native.available(), reason="the native module is not built")
def test_the_engine_checks_what_it_gets():
    (q, k, v, g, beta, state), _ = case(torch.float32)
    run, rest = _native.module().gated_delta_rule_forward, (1.0, True, EPS)
    out, last = torch.empty_like(v), torch.empty_like(state)
    for wrong, message in (
        ((out, last, q, k[:, 1:], v, g, beta, state), "k: wanted"),
        ((out, last, q, k, v, g.double(), beta, state), "g: wanted float32"),
        ((out, last, q, k, v, g, beta, state.mT.contiguous().mT), "rows without gaps"),
        ((out, last[:1], q, k, v, g, beta, state), "final_state: wanted"),
        ((out, last, q, k, v.mT.contiguous().mT, g, beta, state), "unit stride"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*wrong, *rest)
