"""Four-bit linears as one product, on any device: the launch, the margins, what lies side by side."""

from __future__ import annotations

import pytest
import torch
from _compare import DTYPES, assert_bits, padded_rows

from inlay.bases import FourBit
from inlay.ops._registry import RAW_OPS
from inlay.ops.quantized_stack import side_by_side, stack_backward_input, stack_forward

ROWS = [24, 8, 17]


def stack(columns, dtype=torch.bfloat16, double_quant=True, rows=ROWS):
    """The weights of FourBit bases with these rows, and each dense in `dtype`."""
    bases = [FourBit(n, columns, double_quant=double_quant) for n in rows]
    tensors = [(*base.quantize(torch.randn(base.rows, columns) / columns**0.5, "w"), None) for base in bases]
    weights = bases[0].stack_of(bases, torch.empty(999, columns))._weights(tensors)
    return weights, [base.dequantize(dtype, *t) for base, t in zip(bases, tensors, strict=True)]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_panel_holds_the_weights_and_leaves_the_margin(path, dtype, double_quant):
    weights, dense = stack(96, dtype, double_quant)
    panel = torch.full((sum(ROWS), 110), 7.0, dtype=dtype)
    RAW_OPS["dequantize_4bit_stack_"](panel[:, :96], *weights[:4], "nf4", 64)
    assert_bits(panel[:, :96], torch.cat(dense))
    assert bool((panel[:, 96:] == 7).all())


@pytest.mark.parametrize("columns", [20, 96])  # more rows than columns: left rides along; fewer: it is added
@pytest.mark.parametrize("rank", [0, 1, 8, 13])
@pytest.mark.parametrize("apart", [False, True])
def test_forward(path, columns, rank, apart):
    weights, dense = stack(columns)
    x, bias = torch.randn(2, 35, columns).bfloat16(), torch.randn(8).bfloat16()
    left, right = torch.randn(70, rank).bfloat16(), torch.randn(sum(ROWS), rank).bfloat16() / 4
    ours = stack_forward(x, weights, [None, bias, None], *((left, right) if rank else (None, None)), apart=apart)
    branch = (left.double() @ right.double().t()).view(2, 35, -1).split(ROWS, dim=-1)
    for i, (y, weight) in enumerate(zip(ours, dense, strict=True)):
        exact = x.double() @ weight.double().t() + branch[i] + (bias.double() if i == 1 else 0)
        assert y.shape == (2, 35, ROWS[i]) and float((y.double() - exact).norm() / exact.norm()) < 3e-3
    assert (ours[0].untyped_storage().data_ptr() == ours[1].untyped_storage().data_ptr()) != apart


@pytest.mark.parametrize("columns", [20, 96])
@pytest.mark.parametrize("rank", [0, 1, 8, 13])
@pytest.mark.parametrize("together", [False, True])
def test_backward_input(path, columns, rank, together):
    weights, dense = stack(columns)
    dys = [dy.clone() for dy in torch.randn(70, sum(ROWS)).bfloat16().split(ROWS, dim=1)]
    if together:
        dys = list(torch.cat(dys, dim=1).split(ROWS, dim=1))
    left, right = torch.randn(70, rank).bfloat16(), torch.randn(rank, columns).bfloat16() / 4
    dx = stack_backward_input(dys, weights, *((left, right) if rank else (None, None)))
    exact = sum(dy.double() @ w.double() for dy, w in zip(dys, dense, strict=True)) + left.double() @ right.double()
    # One after the other, every sum is rounded to bf16.
    assert float((dx.double() - exact).norm() / exact.norm()) < (3e-3 if together else 5e-3)


def test_what_a_margin_held_before_does_not_matter(path):
    """0 times the NaN of a former tenant would be NaN."""
    weights, _ = stack(20)
    x, left, right = torch.randn(70, 20).bfloat16(), torch.randn(70, 3).bfloat16(), torch.randn(49, 3).bfloat16()
    first = stack_forward(x, weights, [None] * 3, left, right)
    weights.dequantize(x, beside=8).fill_(float("nan"))
    for again, before in zip(stack_forward(x, weights, [None] * 3, left, right), first, strict=True):
        assert_bits(again, before)


def test_side_by_side():
    whole = torch.randn(5, 12)
    a, b, c = whole.split([3, 4, 5], dim=1)
    assert torch.equal(side_by_side([a, b, c]), whole) and torch.equal(side_by_side([b, c]), whole[:, 3:])
    assert side_by_side([b, a]) is None and side_by_side([a, c]) is None and side_by_side([a, b.clone()]) is None
    rows = torch.randn(4, 3)
    assert side_by_side([rows[:2], rows[:2]]) is None  # the same columns twice
    assert torch.equal(side_by_side([padded_rows(whole)[:, :4]]), whole[:, :4])


def test_bases_that_differ_are_no_stack():
    many = torch.empty(999, 64)
    base = FourBit(8, 64)
    assert base.stack_of([base, FourBit(24, 64)], many) is not None
    for other in (FourBit(8, 64, quant_type="fp4"), FourBit(8, 64, blocksize=128), FourBit(8, 64, double_quant=True)):
        assert base.stack_of([base, other], many) is None
    assert base.stack_of([base], many[:1]) is None  # decoded in registers


def test_bad_input(path):
    weights, _ = stack(96)
    with pytest.raises(ValueError, match="packed: wanted 1152 bytes"):
        stack_forward(torch.randn(70, 96), weights._replace(packed=weights.packed[1:] + weights.packed[:1]), [None] * 3)
    if path != "reference":
        with pytest.raises(ValueError, match="out: wanted as many rows as all weights together"):
            RAW_OPS["dequantize_4bit_stack_"](torch.empty(50, 96), *weights[:4], "nf4", 64)
        with pytest.raises(ValueError, match="wanted one each"):
            RAW_OPS["dequantize_4bit_stack_"](torch.empty(49, 96), *weights[:3], [], "nf4", 64)


def test_opcheck():
    weights, _ = stack(96)
    args = (torch.empty(49, 96), *weights[:4], "nf4", 64)
    torch.library.opcheck(torch.ops.inlay.dequantize_4bit_stack_, args)
