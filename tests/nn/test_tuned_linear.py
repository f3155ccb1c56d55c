"""One tuned linear, against a dense one with the merged weight: odd sizes, odd inputs, hooks."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from comparing import assert_close, assert_equal
from families import llama, text_batch
from oracle import deltas_of, randomize
from torch import nn
from transformers.pytorch_utils import Conv1D

import inlay
from inlay.nn.tuned_linear import TunedLinear

SIZES = [1, 7, 113, 203]
UPDATES = ["additive", "in_place"]


def single(rows, columns, side="in", update="additive", dtype=torch.float32, bias=True, conv1d=False, **options):
    """A model of one linear, tuned and as it was, with values in its delta."""
    linear = Conv1D(rows, columns) if conv1d else nn.Linear(columns, rows, bias=bias)
    for parameter in linear.parameters():
        parameter.data = torch.randn_like(parameter) * columns**-0.5
    plain = nn.Sequential(linear).to(dtype)
    method = inlay.S2FT(target_modules=["0"], side=side, update=update, **({"ratio": 0.3} | options))
    tuned = inlay.tune(copy.deepcopy(plain), method)
    randomize(tuned, 0.1)
    return plain, tuned


def check(tuned, x, tolerance=2e-6):
    """Output and both gradients equal those of a dense linear with the merged weight."""
    merged = inlay.merge(tuned).requires_grad_(True)
    delta = deltas_of(tuned)["0"]
    one, other = x.detach().requires_grad_(True), x.detach().clone().contiguous().requires_grad_(True)
    y, wanted = tuned(one), merged(other)
    assert y.shape == wanted.shape and y.dtype is wanted.dtype
    scale = float(wanted.detach().abs().max()) if wanted.numel() else 1.0
    assert_close(y, wanted, atol=tolerance * max(scale, 1.0), what="y")
    cotangent = torch.randn_like(wanted)
    y.backward(cotangent), wanted.backward(cotangent)
    assert_close(one.grad, other.grad, atol=tolerance * 10, what="gradient of x")
    full = merged[0].weight.grad
    full = full.t() if isinstance(merged[0], Conv1D) else full
    full = full.index_select(delta.dim, delta.s2ft_indices)
    assert delta.s2ft_values.grad.shape == delta.s2ft_values.shape
    size = float(full.abs().max()) if full.numel() else 1.0
    assert_close(delta.s2ft_values.grad, full, atol=tolerance * 10 * max(size, 1.0), what="gradient of the values")


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("rows, columns", list(itertools.product(SIZES, SIZES)))
def test_odd_sizes(rows, columns, side, update):
    _, tuned = single(rows, columns, side, update)
    check(tuned, torch.randn(3, 5, columns))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("kind", ["Linear", "Linear without bias", "Conv1D"])
@pytest.mark.parametrize(
    "shape",
    [
        lambda: torch.randn(37),  # one token, no batch
        lambda: torch.randn(1, 37),
        lambda: torch.randn(2, 3, 4, 37),
        lambda: torch.randn(0, 37),  # no tokens
        lambda: torch.randn(2, 0, 37),
        lambda: torch.randn(37, 6).t(),
        lambda: torch.randn(5, 4, 37).transpose(0, 1),
        lambda: torch.randn(1, 37).expand(5, 37),
        lambda: torch.randn(4, 74)[:, ::2],
        lambda: torch.randn(4, 50)[:, 9:46],
        lambda: torch.randn(9, 37)[::3],
    ],
)
def test_shapes_and_strides(shape, kind, side, update):
    _, tuned = single(21, 37, side, update, bias=kind == "Linear", conv1d=kind == "Conv1D")
    check(tuned, shape())


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("side", ["in", "out"])
def test_gradients_that_arrive_with_odd_strides(side, update):
    plain, tuned = single(21, 37, side, update)
    merged = inlay.merge(tuned).requires_grad_(True)
    x = torch.randn(6, 37)
    delta = deltas_of(tuned)["0"]
    for use in (lambda y: y.sum(), lambda y: y[:, ::2].pow(2).sum(), lambda y: y.t().reshape(-1)[::3].sum()):
        delta.s2ft_values.grad = merged[0].weight.grad = None
        use(tuned(x)).backward()
        use(merged(x)).backward()
        wanted = merged[0].weight.grad.index_select(delta.dim, delta.s2ft_indices)
        assert_close(delta.s2ft_values.grad, wanted, atol=1e-4, what="gradient")


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("side", ["in", "out"])
def test_a_weight_with_odd_strides(side, update):
    plain = nn.Sequential(nn.Linear(12, 8))
    plain[0].weight = nn.Parameter(torch.randn(12, 8).t())
    before = plain[0].weight.detach().clone()
    tuned = inlay.tune(copy.deepcopy(plain), inlay.S2FT(target_modules=["0"], channels=3, side=side, update=update))
    randomize(tuned, 0.1)
    check(tuned, torch.randn(5, 12))
    merged = inlay.merge(tuned)[0].weight
    changed = (merged != before).nonzero()[:, 1 if side == "in" else 0]
    assert sorted(set(changed.tolist())) == deltas_of(tuned)["0"].s2ft_indices.tolist()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("given, base", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float64", "float32")])
def test_mixed_dtypes_are_refused_as_torch_does(given, base, update):
    plain, tuned = single(8, 12, update=update, dtype=getattr(torch, base))
    x = torch.randn(3, 12, dtype=getattr(torch, given))
    with pytest.raises((RuntimeError, TypeError)):
        plain(x)
    with pytest.raises((RuntimeError, TypeError), match="dtype|float32"):
        tuned(x)


@pytest.mark.parametrize("update", UPDATES)
def test_casting_the_trainables_is_refused(update):
    """Trainables cast by hand, past `.to(bfloat16)`, would train in bf16; it says what to do instead."""
    _, tuned = single(8, 12, update=update)
    tuned.to(torch.bfloat16)
    tuned(torch.randn(3, 12, dtype=torch.bfloat16))
    for parameter in tuned.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(TypeError, match="keep trainable values in fp32"):
        tuned(torch.randn(3, 12, dtype=torch.bfloat16))


def test_integer_inputs_are_refused():
    _, tuned = single(8, 12)
    with pytest.raises((RuntimeError, TypeError)):
        tuned(torch.ones(3, 12, dtype=torch.int64))


@pytest.mark.parametrize("channels", [12, 1])
def test_all_channels_and_one(channels):
    for side, update in itertools.product(["in", "out"], UPDATES):
        _, tuned = single(12, 12, side, update, channels=channels)
        assert deltas_of(tuned)["0"].s2ft_indices.numel() == channels
        check(tuned, torch.randn(4, 12))


def test_no_channels_to_choose_from():
    with pytest.raises(ValueError, match="at least one channel|channels"):
        inlay.tune(nn.Sequential(nn.Linear(0, 5)), inlay.S2FT(target_modules=["0"], side="in"))


def test_double_backward_is_refused_loudly():
    _, tuned = single(8, 12)
    x = torch.randn(3, 12, requires_grad=True)
    (first,) = torch.autograd.grad(tuned(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad|twice"):
        first.sum().backward()


# --- hooks ----------------------------------------------------------------------------------------------


def test_hooks_put_on_before_tuning_stay():
    model, seen = llama(), []
    layer = model.model.layers[0]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        module = layer.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, name=name: seen.append(("before", name)))
        handle = module.register_forward_hook(lambda m, args, out, name=name: seen.append(("after", name)))
    module.register_full_backward_hook(lambda *_: seen.append(("backward", name)))
    tuned = inlay.tune(model, inlay.S2FT(ratio=0.2))
    tuned(**text_batch(0)).loss.backward()
    assert set(seen) == {(when, n) for when in ("before", "after") for n in ("self_attn.o_proj", "mlp.down_proj")} | {
        ("backward", "mlp.down_proj")
    }
    handle.remove()
    seen.clear()
    tuned(**text_batch(0))
    assert ("after", "mlp.down_proj") not in seen and ("before", "mlp.down_proj") in seen
    plain = inlay.merge(tuned, in_place=True)
    seen.clear()
    plain(**text_batch(0))
    assert ("before", "mlp.down_proj") in seen


def test_a_hook_that_changes_the_output_counts():
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2)).eval()
    with torch.no_grad():
        before = tuned(**text_batch(0)).logits
        tuned.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, out: out * 0)
        assert not torch.equal(tuned(**text_batch(0)).logits, before)


def test_attributes_of_a_linear_are_there():
    _, tuned = single(8, 12)
    assert isinstance(tuned[0], nn.Linear) and isinstance(tuned[0], TunedLinear)
    assert (tuned[0].in_features, tuned[0].out_features) == (12, 8)
    assert tuned[0].weight.shape == (8, 12) and not tuned[0].weight.requires_grad
    _, conv = single(8, 12, conv1d=True)
    assert (conv[0].in_features, conv[0].out_features, conv[0].nf, conv[0].nx) == (12, 8, 8, 12)
    assert conv[0].weight.shape == (12, 8)
    assert "active=['default']" in repr(conv) and "Conv1D" in repr(conv)


def test_embeddings_can_be_resized_and_weights_tied_after_tuning():
    """`weight` is a real Parameter under its own key, which is what transformers' own surgery needs."""
    tuned = inlay.tune(llama(tie_word_embeddings=True), inlay.S2FT(ratio=0.2))
    randomize(tuned, 0.1)
    with torch.no_grad():
        before = tuned.eval()(**text_batch(0)).logits
        tuned.resize_token_embeddings(103)
        after = tuned(**text_batch(0)).logits
    assert after.shape[-1] == 103
    assert_equal(after[..., :97].contiguous(), before.contiguous(), "logits of the old tokens")
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight
    tuned.train()(**text_batch(0)).loss.backward()
