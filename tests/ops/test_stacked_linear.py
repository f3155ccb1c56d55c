"""Several linears of one input: forward and gradients against autograd in float64, and against one at a time."""

from __future__ import annotations

import pytest
import torch
from _compare import DTYPES, assert_as_good, grads, wide
from torch.nn import functional

from inlay.bases import FourBit, Int8
from inlay.ops import DenseBase, DenseBaseT
from inlay.ops.lora_linear import lora_linear
from inlay.ops.stacked_linear import Part, stacked_linear

WIDTH = 96
# kind, out, rank (0: no LoRA), bias
STACKS = {
    "frozen": [("dense", 20, 0, True), ("dense", 12, 0, False)],
    "lora": [("dense", 20, 4, False), ("dense", 12, 9, True), ("dense", 7, 1, False)],
    "mixed": [("nf4", 20, 4, True), ("conv1d", 12, 0, True), ("int8", 7, 3, False), ("nf4", 5, 0, False)],
    "nf4": [("nf4", 24, 8, False), ("nf4", 8, 8, True), ("nf4", 8, 8, False)],
    "nf4, LoRA on one": [("nf4", 24, 0, False), ("nf4", 8, 3, False), ("nf4", 8, 0, True)],
    "alone": [("dense", 20, 4, True)],
}


def make_part(kind, out, rank, bias, dtype):
    """A part, and its dense weight in float64."""
    weight = (torch.randn(out, WIDTH) / WIDTH**0.5).to(dtype)
    b = torch.randn(out).to(dtype) if bias else None
    base = {"dense": DenseBase, "conv1d": DenseBaseT, "int8": Int8(out, WIDTH), "nf4": FourBit(out, WIDTH)}[kind]
    if kind in ("dense", "conv1d"):
        tensors, exact = (weight if kind == "dense" else weight.t().contiguous(), b), weight.double()
    else:
        tensors = (*base.quantize(weight, kind), b)
        exact = base.dequantize(torch.float32, *tensors).double()
    if not rank:
        return Part(base, tensors), exact
    factors = torch.randn(rank, WIDTH) / WIDTH**0.5, torch.randn(out, rank) / rank**0.5
    return Part(base, tensors, *(f.requires_grad_() for f in factors), 1.3), exact


def exactly(x, parts, weights, dtype=torch.float64):
    outputs, factors = [], []
    for part, weight in zip(parts, weights, strict=True):
        bias = None if part.tensors[-1] is None else part.tensors[-1].to(dtype)
        y = functional.linear(x, weight.to(dtype), bias)
        if part.a is not None:
            pair = [t.detach().to(dtype).requires_grad_() for t in (part.a, part.b)]
            factors += pair
            y = y + part.scale * functional.linear(functional.linear(x, pair[0]), pair[1])
        outputs.append(y)
    return tuple(outputs), factors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stack", STACKS)
def test_against_float64(path, stack, dtype):
    made = [make_part(*row, dtype) for row in STACKS[stack]]
    parts, weights = [part for part, _ in made], [weight for _, weight in made]
    factors = [t for part in parts if part.a is not None for t in (part.a, part.b)]
    for rows in (1, 17, 70):
        x = torch.randn(2, rows, WIDTH).to(dtype).requires_grad_()
        dys = [torch.randn(2, rows, row[1]).to(dtype) for row in STACKS[stack]]
        ours = stacked_linear(x, parts)
        (x64,) = wide(x)
        exact, exact_factors = exactly(x64.requires_grad_(), parts, weights)
        eager, eager_factors = exactly(x, parts, weights, dtype)
        for i, triple in enumerate(zip(ours, eager, exact, strict=True)):
            assert_as_good(*triple, f"output {i}, {rows} rows", slack=2)
        got = grads(ours, [x, *factors], dys)
        wanted = grads(exact, [x64, *exact_factors], dys)
        near = grads(eager, [x, *eager_factors], dys)
        for i, triple in enumerate(zip(got, near, wanted, strict=True)):
            assert_as_good(*triple, f"gradient {i}, {rows} rows", slack=3 if i == 0 else 8)
        assert all(g.dtype == torch.float32 for g in got[1:])


def test_the_same_as_one_at_a_time_and_only_what_is_asked_for():
    parts = [make_part(*row, torch.float32)[0] for row in STACKS["lora"]]
    x = torch.randn(5, WIDTH)
    ours = stacked_linear(x, parts)
    for part, y in zip(parts, ours, strict=True):
        torch.testing.assert_close(y, lora_linear(x, part.a, part.b, part.scale, part.base, *part.tensors))
    ours[0].sum().backward()  # the others got no gradient at all, and x wants none
    assert x.grad is None and bool(parts[0].a.grad.any())
    assert not parts[1].a.grad.any() and not parts[1].b.grad.any()


def test_gradcheck():
    weight = torch.randn(4, 6, dtype=torch.float64)
    factors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 6), (4, 2))]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def run(x, a, b):
        return stacked_linear(x, [Part(DenseBase, (weight, None), a, b, 0.5), Part(DenseBase, (weight.sin(), None))])

    assert torch.autograd.gradcheck(run, (x, *factors))


def test_autocast_computes_in_bf16_with_fp32_gradients():
    parts = [make_part(*row, torch.float32)[0] for row in STACKS["lora"]]
    x = torch.randn(40, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = stacked_linear(x, parts)
    assert all(y.dtype == torch.bfloat16 for y in ours)
    sum(y.float().sum() for y in ours).backward()
    assert x.grad.dtype == parts[0].a.grad.dtype == torch.float32


def test_refuses_what_does_not_fit():
    part, _ = make_part("dense", 8, 4, False, torch.float32)
    with pytest.raises(ValueError, match="parts: wanted one or more linears, got none"):
        stacked_linear(torch.randn(2, WIDTH), [])
    with pytest.raises(ValueError, match=r"inlay.stacked_linear: A, B: wanted \[r, 95\] and \[out, r\]"):
        stacked_linear(torch.randn(2, 95), [part])
    with pytest.raises(TypeError, match="wanted torch.float32, got torch.bfloat16"):
        stacked_linear(torch.randn(2, WIDTH), [part._replace(a=part.a.bfloat16())])
