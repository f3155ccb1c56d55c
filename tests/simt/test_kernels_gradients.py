"""Gradients on tensor cores: sums over tokens in fp32 (test_kernels_blocks.py says in which places)."""

from __future__ import annotations

import pytest
import torch
from _compare import assert_bits, padded_rows
from _kernels import moved, randn

from inlay import _native
from inlay.ops._registry import RAW_OPS
from inlay.ops.lora_linear import one_pass
from inlay.ops.submatrix import narrow_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, columns, chosen",
    [(600, 136, 16), (70, 64, 1), (257, 200, 40), (1, 9, 7), (513, 67, 64), (0, 8, 8), (64, 16, 0)],
)
def test_submatrix_grad(place, dtype, tokens, columns, chosen):
    """The op, and the kernel for narrow deltas with one share of the tokens and several, either way round."""
    dy, x = (padded_rows(randn(tokens, width, dtype=dtype)) for width in (columns, chosen))
    for left, right in ((dy, x), (dy.contiguous(), x.contiguous())):
        exact = left.double().t() @ right.double()
        ways = [RAW_OPS["submatrix_grad"](*moved((left, right), place)).cpu()]
        if place.type == "cuda" or _native.module().isa() == "simt":
            for processors in (1, 8):
                ways.append(narrow_grad(*moved((left, right), place), processors).cpu())
                ways.append(narrow_grad(*moved((left, right), place), processors, transposed=True).cpu().t())
        for got in ways:
            assert got.dtype == torch.float32 and got.shape == exact.shape
            assert float((got - exact).norm()) <= 5e-5 * float(exact.norm()), "wanted fp32 sums"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, columns, rank",
    [(600, 136, 16), (70, 64, 1), (257, 200, 8), (1, 9, 7), (513, 67, 16), (0, 8, 8), (64, 16, 0), (1100, 40, 4)],
)
def test_lora_backward(place, dtype, tokens, columns, rank):
    """The op, and the one pass in few parts and in many, also where there is more room than work."""
    dy, xa = (padded_rows(randn(tokens, width, dtype=dtype)) for width in (columns, rank))
    sb = randn(columns, rank, dtype=dtype)
    for left, right in ((dy, xa), (dy.contiguous(), xa.contiguous())):
        exact = left.double() @ sb.double(), left.double().t() @ right.double()
        dyb, db = (t.cpu() for t in RAW_OPS["lora_backward"](*moved((left, right, sb), place)))
        assert dyb.dtype == dtype and float((dyb - exact[0]).norm()) <= 4e-3 * float(exact[0].norm())
        ways = [(exact[0].float(), db)]
        if place.type == "cuda" or _native.module().isa() == "simt":
            ways += [one_pass(*moved((left, right, sb), place), processors) for processors in (1, 3, 40)]
            assert_bits(one_pass(*moved((left, right, sb), place), 3)[1].cpu(), ways[2][1].cpu(), "again")
        for way in ways:
            for got, wanted in zip(way, exact, strict=True):
                assert got.dtype == torch.float32 and got.shape == wanted.shape
                assert float((got.cpu() - wanted).norm()) <= 5e-5 * float(wanted.norm()), "wanted fp32 sums"


def test_one_pass_has_the_same_bits_in_every_order(emulated):
    """dyb is added up in shared memory, db in registers, each number by one thread."""
    dy, xa, sb = (randn(*shape, dtype=torch.bfloat16) for shape in ((1100, 200), (1100, 16), (200, 16)))
    with _native.using(emulated):
        results = []
        for order in ("simt-forward", "simt-reverse", "simt-random:1", "simt-random:2"):
            emulated.set_isa(order)
            results.append(one_pass(dy, xa, sb, 3))
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            assert_bits(got, wanted)


@pytest.mark.parametrize("rows", [255, 4097])
def test_sums_over_many_tokens(place, rows):
    """Several stages and shares: dyᵀ·x, and LoRA's backward."""
    dy, x = randn(rows, 72, dtype=torch.bfloat16), randn(rows, 8, dtype=torch.bfloat16)
    sb = randn(72, 8, dtype=torch.bfloat16)
    db, dyb = dy.double().t() @ x.double(), dy.double() @ sb.double()
    results = [(RAW_OPS["submatrix_grad"](*moved((dy, x), place)), db)]
    if place.type == "cuda" or _native.module().isa() == "simt":
        results += zip(one_pass(*moved((dy, x, sb), place), 4), (dyb, db))
        results.append((narrow_grad(*moved((dy, x), place), 4), db))
    for got, wanted in results:
        assert float((got.cpu() - wanted).norm()) <= 5e-5 * float(wanted.norm()), "wanted fp32 sums"
