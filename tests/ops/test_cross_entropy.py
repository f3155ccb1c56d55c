"""Chunked linear + cross-entropy against float64 and against torch's eager pair."""

import pytest
import torch
from _compare import DTYPES, assert_as_good, grads, strided, wide
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inlay import ops
from inlay.ops.cross_entropy import cross_entropy_chunk_


def _case(dtype, tokens=(3, 7), width=16, vocabulary=1203):
    hidden = torch.randn(*tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, tokens)
    labels.view(-1)[::3] = -100
    return hidden, weight, bias, labels


def _eager(hidden, weight, bias, labels, num_items=None):
    logits = functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    reduction = "mean" if num_items is None else "sum"
    loss = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)
    return loss if num_items is None else loss / num_items


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_items", [None, 9, torch.tensor(9)])
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_against_float64(path, dtype, num_items, chunk):
    hidden, weight, bias, labels = _case(dtype)
    inputs, wide_inputs = [hidden, weight, bias], [t.requires_grad_() for t in wide(hidden, weight, bias)]
    ours = ops.linear_cross_entropy(hidden, weight, labels, num_items=num_items, bias=bias, chunk=chunk)
    eager, exact = _eager(*inputs, labels, num_items), _eager(*wide_inputs, labels, num_items)
    assert ours.dtype == torch.float32 and ours.shape == ()
    assert_as_good(ours, eager, exact, "loss")
    factor = torch.tensor(0.7)
    for name, got, plain, wanted in zip(
        ("d_hidden", "d_weight", "d_bias"),
        grads(ours, inputs, [factor]),
        grads(eager, inputs, [factor]),
        grads(exact, wide_inputs, [factor]),
        strict=True,
    ):
        assert_as_good(got, plain, wanted, name, slack=4)


def test_all_supervised_and_no_grad(path):
    hidden, weight, _, labels = _case(torch.float32)
    labels = labels.clamp(min=0)
    with torch.no_grad():
        quiet = ops.linear_cross_entropy(hidden, weight, labels)
    loud = ops.linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loud, _eager(hidden, weight, None, labels))
    assert not quiet.requires_grad and torch.equal(quiet, loud.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [4, None])
def test_head_in_fp32(path, dtype, chunk):
    """Trained in fp32 under a model of 16 bits: products round it, its gradient is the fp32 sum."""
    hidden, weight, bias, labels = _case(dtype)
    wide_weight, wide_bias = (t.detach().float().requires_grad_() for t in (weight, bias))
    inputs, doubles = [hidden, wide_weight, wide_bias], [t.requires_grad_() for t in wide(hidden, weight, bias)]
    ours = ops.linear_cross_entropy(hidden, wide_weight, labels, bias=wide_bias, chunk=chunk)
    assert torch.equal(ours, ops.linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=chunk))
    eager, exact = _eager(hidden, weight, bias, labels), _eager(*doubles, labels)
    narrow = grads(eager, [hidden, weight, bias], [torch.tensor(0.7)])
    for got, like, plain, wanted in zip(
        grads(ours, inputs, [torch.tensor(0.7)]),
        inputs,
        narrow,
        grads(exact, doubles, [torch.tensor(0.7)]),
        strict=True,
    ):
        assert got.dtype == like.dtype
        assert_as_good(got, plain, wanted, slack=4)


def test_head_in_fp32_under_autocast(path):
    """The gradient does not pass through the autocast dtype: it has more than bf16's eight bits."""
    hidden, weight, _, labels = _case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ops.linear_cross_entropy(hidden, weight, labels).backward()
    wanted = torch.autograd.grad(_eager(hidden, weight, None, labels), weight)[0]
    assert weight.grad.dtype == torch.float32 and not torch.equal(weight.grad, weight.grad.bfloat16().float())
    assert float((weight.grad - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [20, 70])
def test_a_trained_head_makes_no_copy_of_its_size(head_dtype, tokens):
    """One chunk, and several: beside the gradient no tensor as large as the head but the fp32 sum and the cast head."""
    hidden, weight = torch.randn(tokens, 16).bfloat16(), torch.randn(4000, 16).to(head_dtype).requires_grad_()
    labels, made = torch.randint(0, 4000, (tokens,)), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            known = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            out = func(*args, **(kwargs or {}))
            new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.data_ptr() not in known]
            made.extend(t.dtype for t in new if t.numel() == weight.numel())
            return out

    with Sizes():
        loss = ops.linear_cross_entropy(hidden, weight, labels, chunk=None if tokens == 20 else 16)
    alone = tokens == 20 and head_dtype == torch.bfloat16
    cast_head = [torch.bfloat16] if head_dtype == torch.float32 else []
    assert sorted(map(str, made)) == sorted(map(str, [torch.bfloat16 if alone else torch.float32, *cast_head]))
    kept = loss.grad_fn.saved_tensors[1].data_ptr()
    loss.backward()
    assert weight.grad.dtype == head_dtype
    assert (weight.grad.data_ptr() == kept) == (alone or head_dtype == torch.float32)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_backward_twice(path, factor):
    """What is kept is handed out as it is where the incoming gradient is 1, and stays what it was."""
    hidden, weight, bias, labels = _case(torch.bfloat16)
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias=bias) * factor
    first = torch.autograd.grad(loss, [hidden, weight, bias], retain_graph=True)
    kept = [t.clone() for t in first]
    for got, wanted in zip(torch.autograd.grad(loss, [hidden, weight, bias]), kept, strict=True):
        assert torch.equal(got, wanted)


def test_frozen_head_gets_no_gradient(path):
    hidden, weight, _, labels = _case(torch.bfloat16)
    ops.linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert weight.grad is None
    assert not bool(hidden.grad.view(-1, 16)[::3].any())  # unsupervised rows


def test_no_supervised_token(path):
    hidden, weight, _, labels = _case(torch.float32)
    nothing = torch.full_like(labels, -100)
    assert ops.linear_cross_entropy(hidden, weight, nothing).isnan()
    loss = ops.linear_cross_entropy(hidden, weight, nothing, num_items=4)
    loss.backward()
    assert float(loss) == 0 and not bool(hidden.grad.any())


def test_own_ignore_index(path):
    hidden, weight, _, labels = _case(torch.float32)
    wanted = ops.linear_cross_entropy(hidden, weight, labels)
    assert float(
        ops.linear_cross_entropy(hidden, weight, labels.masked_fill(labels == -100, -1), ignore_index=-1)
    ) == float(wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 113, 1024, 2051])
def test_chunk(path, dtype, vocabulary):
    logits = (torch.randn(5, vocabulary) * 6).to(dtype)
    labels = torch.randint(0, vocabulary, (5,))
    exact = logits.double().requires_grad_()
    losses = functional.cross_entropy(exact, labels, reduction="none")
    wanted = torch.autograd.grad(losses.sum(), exact)[0] * 0.3
    plain = torch.log_softmax(logits.float(), -1)
    plain_loss = -plain.gather(1, labels[:, None])[:, 0]
    plain_grad = ((plain.exp() - functional.one_hot(labels, vocabulary)) * 0.3).to(dtype)
    untouched = logits.clone()
    loss = cross_entropy_chunk_(untouched, labels, 0.3, False)
    assert torch.equal(untouched, logits)
    for view in (logits.clone(), strided(logits)):
        assert_as_good(cross_entropy_chunk_(view, labels, 0.3, True), plain_loss, losses.detach(), "loss", slack=2)
        assert_as_good(view, plain_grad, wanted, "gradient", slack=2)
    assert_as_good(loss, plain_loss, losses.detach(), "loss only", slack=2)


def test_extremes(path):
    """Leading blocks of -inf, a huge logit, and NaN: as torch has them."""
    logits = torch.randn(4, 3000)
    logits[0, :2500] = float("-inf")
    logits[1, 17] = 1e30
    logits[2, 2999] = float("nan")
    logits[3, :] = float("-inf")
    labels = torch.tensor([2800, 17, 5, 0])
    wanted = functional.cross_entropy(logits, labels, reduction="none")
    got = cross_entropy_chunk_(logits.clone(), labels, 1.0, True)
    torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_bad_input(path):
    hidden, weight, _, labels = _case(torch.float32)
    with pytest.raises(IndexError, match="labels: wanted values in"):
        ops.linear_cross_entropy(hidden, weight, labels + 1000)
    with pytest.raises(TypeError, match="weight: wanted"):
        ops.linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(TypeError, match="bias: wanted"):
        ops.linear_cross_entropy(hidden, weight, labels, bias=torch.zeros(1203, dtype=torch.float16))
    with pytest.raises(ValueError, match="labels: wanted shape"):
        ops.linear_cross_entropy(hidden, weight, labels[0])
    with pytest.raises(ValueError, match="chunk"):
        ops.linear_cross_entropy(hidden, weight, labels, chunk=0)
