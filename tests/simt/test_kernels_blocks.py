"""Kernels of fused blocks, the loss and the submatrix delta against float64: odd sizes, views, every dtype.

One test per kernel here and in the other test_kernels files, in three places: the CPU kernels, the CUDA kernels under
host emulation in three thread orders, and the CUDA kernels on a GPU (marked gpu)."""

from __future__ import annotations

import pytest
import torch
from _compare import DTYPES, assert_bits, padded_rows, sorted_choice
from _kernels import check, moved, outputs, randn

from inlay.ops._registry import RAW_OPS
from inlay.ops.swiglu import ACTIVATIONS

# rows, width: one element, odd, packs of 8 and of 1, several blocks a row, no row
SIZES = [(1, 1), (3, 7), (5, 203), (4, 256), (2, 2056), (0, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", SIZES)
def test_rms_norm(place, dtype, rows, width):
    x, dy, weight = randn(rows, width, dtype=dtype, spread=3), randn(rows, width, dtype=dtype), randn(width)
    for scale, offset in ((weight.to(dtype), 1.0), (weight, 0.0), (None, 0.0)):
        _, rstd = check("rms_norm_forward", (x, scale, 1e-5, offset), place)
        for needs in ((True, False), (True, True), (False, True))[: 1 if scale is None else 3]:
            check("rms_norm_backward", (dy, x, scale, rstd.cpu(), offset, *needs), place, slack=8, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [*SIZES, (150, 24)])
def test_scale_shift(place, dtype, rows, width):
    x, dy = (randn(rows, width, dtype=dtype, spread=3) for _ in range(2))
    for channels in (None, sorted_choice(width, (width + 2) // 3), torch.arange(width)):
        size = width if channels is None else len(channels)
        gamma, beta = randn(size), randn(size)
        kept = x if channels is None else x[:, channels].contiguous()
        for scale, shift in ((gamma, beta), (gamma, None), (None, beta)):
            check("scale_shift_forward", (x, scale, shift, channels), place)
        for needs in ((True, True, True), (True, False, True), (False, True, False), (True, False, False)):
            check("scale_shift_backward", (dy, kept, gamma, channels, *needs), place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("rows, width", SIZES[1:5])
def test_swiglu(place, dtype, act, rows, width):
    gate, up, dh = (randn(rows, width, dtype=dtype, spread=3) for _ in range(3))
    (h,) = check("swiglu_forward", (gate, up, act), place)
    indices = sorted_choice(width, (width + 2) // 3)
    _, _, h_sel = check("swiglu_backward", (dh, gate, up, act, indices), place)
    assert_bits(h_sel.cpu(), h.cpu()[:, indices], "h[..., I]")
    assert RAW_OPS["swiglu_backward"](*moved((dh, gate, up, act, None), place))[2].shape == (rows, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [31, 256, 2056])
def test_swiglu_rebuilds_any_choice(place, dtype, width):
    """The first and the last channel, a run of them, all: each warp finds those of its own columns."""
    gate, up, dh = (randn(3, width, dtype=dtype) for _ in range(3))
    h = RAW_OPS["swiglu_forward"](*moved((gate, up), place), "silu").cpu()
    run = torch.arange(width // 3, width // 3 + min(width // 2, 70))
    for indices in (
        torch.tensor([0]),
        torch.tensor([width - 1]),
        torch.tensor([0, width - 1]),
        run,
        torch.arange(width),
    ):
        h_sel = RAW_OPS["swiglu_backward"](*moved((dh, gate, up), place), "silu", indices.to(place))[2]
        assert_bits(h_sel.cpu(), h[:, indices], f"{len(indices)} channels")


def test_swiglu_extremes(place):
    gate = torch.tensor([[-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30, float("nan")]])
    for act in ACTIVATIONS:
        got = RAW_OPS["swiglu_forward"](gate.to(place), torch.ones_like(gate).to(place), act)
        wanted = RAW_OPS["swiglu_forward"].reference(gate.double(), torch.ones(1, 9).double(), act).float()
        torch.testing.assert_close(got.cpu(), wanted, equal_nan=True, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, tokens, channels, taps", [(2, 70, 37, 4), (1, 1, 1, 1), (3, 5, 130, 7), (1, 129, 8, 2)]
)
def test_causal_conv1d(place, dtype, batch, tokens, channels, taps):
    """Fewer tokens than taps, several spans, channels beyond a block; views; taps and bias of their own dtypes."""
    x, dy = (randn(batch, tokens, channels + 3, dtype=dtype)[..., 1 : channels + 1] for _ in range(2))
    weight, bias = randn(channels, taps, dtype=dtype), randn(channels)
    for held, shift, silu in ((weight, None, True), (weight.float(), bias, True), (weight, bias, False)):
        check("causal_conv1d_forward", (x, held, shift, silu), place)
        for needs in ((True, True), (True, False), (False, True)):
            check("causal_conv1d_backward", (dy, x, held, shift, silu, *needs), place, slack=8, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("width, rotary, batches", [(20, 20, 1), (20, 6, 2), (64, 64, 1), (2, 2, 1), (24, 16, 2)])
def test_rope(place, dtype, inverse, width, rotary, batches):
    q, k = (randn(2, 5, heads, width, dtype=dtype).transpose(1, 2) for heads in (6, 2))
    for angle_dtype in {dtype, torch.float32}:
        angles = randn(batches, 5, rotary, spread=3)
        check("rope_rotate", (q, k, angles.cos().to(angle_dtype), angles.sin().to(angle_dtype), inverse), place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, chosen", [(1, 1, 1), (5, 7, 3), (3, 603, 601), (70, 64, 16), (0, 9, 4)])
def test_submatrix(place, dtype, rows, width, chosen):
    x, indices, acc = randn(rows, width, dtype=dtype), sorted_choice(width, chosen), randn(rows, width)
    picked = acc[:, :chosen].contiguous()
    for view in (x, padded_rows(x)):
        for out_dtype in {dtype, torch.float32}:
            (got,) = outputs(RAW_OPS["submatrix_gather"], moved((view, indices, out_dtype), place), ())
            assert_bits(got.cpu(), x[:, indices].to(out_dtype), "gather")
        assert_bits(
            outputs(RAW_OPS["submatrix_add"], (view.to(place), acc.to(place)), ())[0].cpu(),
            (x.float() + acc).to(dtype),
            "add",
        )
    wanted = x.clone()
    wanted[:, indices] = (x[:, indices].float() + picked).to(dtype)
    args = moved((x, indices, picked), place)
    RAW_OPS["submatrix_scatter_add_"](*args)
    assert_bits(args[0].cpu(), wanted, "scatter_add_")
    for dim, values in ((1, picked), (0, randn(min(chosen, rows), width))):
        for transposed in (False, True):
            weight = x.t().contiguous().t() if transposed else x.clone()
            where = indices if dim == 1 else torch.arange(values.shape[0])
            wanted = weight.clone().index_copy_(dim, where, values.to(dtype))
            target = weight.to(place)
            RAW_OPS["submatrix_write_"](target, where.to(place), values.to(place), dim)
            assert_bits(target.cpu(), wanted, f"write_, dim {dim}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 113, 1024, 5003])
def test_cross_entropy(place, dtype, vocabulary):
    logits, labels = randn(3, vocabulary, dtype=dtype, spread=6), torch.randint(0, vocabulary, (3,))
    check("cross_entropy_chunk_", (logits, labels, 0.3, True), place, mutated=(0,), slack=2)
    (loss,) = check("cross_entropy_chunk_", (logits, labels, 0.3, False), place, slack=2)
    untouched = logits.to(place)
    RAW_OPS["cross_entropy_chunk_"](untouched, labels.to(place), 0.3, False)
    assert_bits(untouched.cpu(), logits)
    padded = padded_rows(logits).to(place)
    assert_bits(RAW_OPS["cross_entropy_chunk_"](padded, labels.to(place), 0.3, False), loss)


def test_cross_entropy_extremes(place):
    logits = randn(4, 3000)
    logits[0, :2500] = float("-inf")
    logits[1, 17] = 1e30
    logits[2, 2999] = float("nan")
    logits[3, :] = float("-inf")
    labels = torch.tensor([2800, 17, 5, 0])
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    got = RAW_OPS["cross_entropy_chunk_"](logits.to(place), labels.to(place), 1.0, True)
    torch.testing.assert_close(got.cpu(), wanted, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [8, 9, 17, 63, 65, 255])
def test_counts_of_rows(place, rows):
    """Around every tile and block edge, in bf16; kernels with a block per row do not care, and are quick."""
    x, y = (randn(rows, 72, dtype=torch.bfloat16) for _ in range(2))
    _, rstd = check("rms_norm_forward", (x, None, 1e-5, 0.0), place)
    check("rms_norm_backward", (y, x, randn(72), rstd.cpu(), 0.0, True, True), place, slack=8, atol=1e-6)
    check("scale_shift_backward", (y, x, randn(72), None, True, True, True), place)
    check("swiglu_backward", (x, y, x, "silu", sorted_choice(72, 9)), place)
    check("cross_entropy_chunk_", (x, torch.randint(0, 72, (rows,)), 0.3, True), place, mutated=(0,), slack=2)
    check("submatrix_scatter_add_", (x, sorted_choice(72, 9), randn(rows, 9)), place, mutated=(0,))
    q, k = (t.view(1, rows, 9, 8).transpose(1, 2) for t in (x, y))
    check("rope_rotate", (q, k, randn(1, rows, 8), randn(1, rows, 8), False), place)
