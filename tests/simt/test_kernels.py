"""Every CUDA kernel and its CPU twin against the float64 reference: odd sizes, views, every dtype.

One test per kernel, in three places: the CPU kernels, the CUDA kernels under host emulation in three thread orders,
and the CUDA kernels on a GPU (marked gpu).
"""

from __future__ import annotations

import importlib

import pytest
import torch
from _compare import DTYPES, assert_as_good, assert_bits, padded_rows, sorted_choice
from torch import Tensor
from torch.utils._pytree import tree_map_only

from inlay import _native
from inlay.ops import force_path
from inlay.ops._registry import RAW_OPS
from inlay.ops.lora_linear import add_in_two_launches, one_pass
from inlay.ops.quantize_blockwise import (
    dequantize_4bit,
    dequantize_4bit_,
    dequantize_absmax,
    dynamic_map,
    levels,
    quantize_absmax,
)
from inlay.ops.quantized_linear import fused_lora
from inlay.ops.submatrix import narrow_grad
from inlay.ops.swiglu import ACTIVATIONS

# rows, width: one element, odd, packs of 8 and of 1, several blocks a row, no row
SIZES = [(1, 1), (3, 7), (5, 203), (4, 256), (2, 2056), (0, 8)]


def widened(args):
    """The same, already rounded, values in float64."""
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)


def moved(args, place):
    return tree_map_only(Tensor, lambda t: t.clone().to(place), args)


def outputs(op, args, mutated):
    """What the op returns, followed by the arguments it writes to."""
    result = op(*args)
    returned = result if isinstance(result, tuple) else (result,) if result is not None else ()
    written = [args[i] for i in mutated]
    return [*returned, *(t for item in written for t in (item if isinstance(item, list) else [item]))]


def check(name, args, place, mutated=(), slack=4.0, atol=1e-30):
    """One op at one place against its reference in the same dtype and in float64."""
    op = RAW_OPS[name]
    ours = outputs(op, moved(args, place), mutated)
    plain = outputs(op.reference, moved(args, "cpu"), mutated)
    exact = outputs(op.reference, widened(moved(args, "cpu")), mutated)
    assert len(ours) == len(exact)
    for i, (got, same_dtype, wanted) in enumerate(zip(ours, plain, exact, strict=True)):
        assert got.device.type == place.type and got.dtype == same_dtype.dtype
        assert_as_good(got.cpu(), same_dtype, wanted, f"{name}, output {i}", slack=slack, atol=atol)
    return ours


def randn(*shape, dtype=torch.float32, spread=1.0):
    return (torch.randn(*shape) * spread).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", SIZES)
def test_rms_norm(place, dtype, rows, width):
    x, dy, weight = randn(rows, width, dtype=dtype, spread=3), randn(rows, width, dtype=dtype), randn(width)
    for scale, offset in ((weight.to(dtype), 1.0), (weight, 0.0), (None, 0.0)):
        _, rstd = check("rms_norm_forward", (x, scale, 1e-5, offset), place)
        check("rms_norm_backward", (dy, x, scale, rstd.cpu(), offset), place, slack=8, atol=1e-6)


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


@pytest.mark.parametrize("shapes", [[(1,), (7, 3), (113,), (0, 5), (4097,)], [(3,)] * 70, []])
@pytest.mark.parametrize("misaligned", [False, True])
def test_adamw(place, shapes, misaligned):
    lists = [[torch.rand(shape) + 0.1 * i for shape in shapes] for i in range(4)]
    if misaligned:  # four bytes behind a 16-byte boundary
        lists = [[torch.cat((t.new_zeros(1), t.view(-1)))[1:] for t in tensors] for tensors in lists]
    scalars = (0.03, 0.8, 0.95, 1e-6, 0.1, 3, 0.5)
    plain, ours = [t.clone() for t in lists[0]], moved(lists, place)
    RAW_OPS["adamw_step_"].reference(plain, lists[1], *moved(lists[2:], "cpu"), *scalars)
    RAW_OPS["adamw_step_"](*ours, *scalars)
    for p, g, m, v, same_dtype, got in zip(*widened(lists), plain, zip(ours[0], ours[2], ours[3])):
        g, m, v = 0.5 * g, m + 0.2 * (0.5 * g - m), 0.95 * v + 0.05 * (0.5 * g) ** 2
        p = p * (1 - 0.003) - 0.03 / (1 - 0.8**3) * m / ((v / (1 - 0.95**3)).sqrt() + 1e-6)
        assert_as_good(got[0].cpu(), same_dtype, p, "parameter", slack=2)
        assert_as_good(got[1].cpu(), m.float(), m, "exp_avg", slack=2)
        assert_as_good(got[2].cpu(), v.float(), v, "exp_avg_sq", slack=2)


@pytest.mark.parametrize("sizes", [[1, 257, 0, 4096, 8195], [300] * 70])
@pytest.mark.parametrize("misaligned", [False, True])
def test_adamw_8bit(place, sizes, misaligned):
    """Bit for bit the scalar CPU kernel (the others fuse multiply-adds), which tests/ops/test_adamw.py tests."""
    if place.type == "cpu" and _native.module().isa() != "simt":
        pytest.skip("tests/ops has its own")
    lists = [[torch.randn(size) * (i + 1) for size in sizes] for i in range(2)]
    lists += [[torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes] for _ in range(2)]
    lists += [[torch.rand(-(-size // 256)) for size in sizes] for _ in range(2)]
    if misaligned:
        lists[:4] = [[torch.cat((t.new_zeros(1), t))[1:] for t in tensors] for tensors in lists[:4]]
    ours, wanted = moved(lists, place), moved(lists, "cpu")
    maps = [dynamic_map(torch.device("cpu"), signed) for signed in (True, False)]
    cpu_engine = importlib.import_module("inlay._C")
    cpu_engine.set_isa("scalar")
    for step in (3, 4):
        scalars = (0.03, 0.8, 0.95, 1e-6, 0.1, step, 0.5)
        RAW_OPS["adamw_8bit_step_"](*ours, *scalars)
        cpu_engine.adamw_8bit_step(*wanted, *maps, *scalars)
    for i, name in ((0, "params"), (2, "m"), (3, "v"), (4, "absmax of m"), (5, "absmax of v")):
        for got, want in zip(ours[i], wanted[i], strict=True):
            assert_bits(got.cpu(), want, name)


def bf16_parameters(sizes, misaligned, gradients, residual):
    """Parameters and gradients, their residuals and their positions; NaN, infinities and values beyond bf16's reach."""
    params = [randn(size, dtype=torch.bfloat16) for size in sizes]
    grads = [randn(size, dtype=gradients) * (i + 1) for i, size in enumerate(sizes)]
    for p, g in zip(params, grads, strict=True):
        if p.numel() > 256:
            p[:4] = torch.tensor([float("nan"), float("inf"), torch.finfo(torch.bfloat16).max, 0.0])
            g[3:6] = torch.tensor([0.0, float("nan"), float("-inf")])
    residuals = [torch.randint(-(1 << 15), 1 << 15, (size,)).to(torch.int16) for size in sizes] if residual else []
    if misaligned:  # one element behind a 16-byte boundary
        lists = ([torch.cat((t.new_zeros(1), t))[1:] for t in tensors] for tensors in (params, grads, residuals))
        params, grads, residuals = lists
    return params, grads, residuals


@pytest.mark.parametrize("sizes", [[1, 257, 0, 4096, 8195], [300] * 70])
@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("gradients", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounding", ["residual", "stochastic"])
@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_adamw_bf16(place, sizes, misaligned, gradients, rounding, states):
    """Bit for bit the scalar CPU kernel (the others fuse multiply-adds), which tests/ops/test_adamw_bf16.py tests."""
    if place.type == "cpu" and _native.module().isa() != "simt":
        pytest.skip("tests/ops has its own")
    params, grads, residuals = bf16_parameters(sizes, misaligned, gradients, rounding == "residual")
    if states == "fp32":
        beside = [[torch.rand(size) for size in sizes] for _ in range(2)]
    else:
        beside = [[torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes] for _ in range(2)]
        beside += [[torch.rand(-(-size // 256)) for size in sizes] for _ in range(2)]
    # From place 3 on, vectors that start on 16 bytes would begin in the middle of a call of Philox.
    first = 3 if states == "fp32" and len(sizes) > 5 else 1 << 40
    positions = [] if residuals else [first + i * 8200 for i in range(len(sizes))]
    ours, wanted = (moved([params, grads, *beside, residuals], where) for where in (place, "cpu"))
    maps = [dynamic_map(torch.device("cpu"), signed) for signed in (True, False)] if states == "8bit" else []
    name = "adamw_bf16_step" if states == "fp32" else "adamw_8bit_bf16_step"
    cpu_engine = importlib.import_module("inlay._C")
    cpu_engine.set_isa("scalar")
    for step in (3, 4):
        scalars = (0.03, 0.8, 0.95, 1e-6, 0.1, step, 0.5, -7)
        RAW_OPS[f"{name}_"](*ours, positions, *scalars)
        getattr(cpu_engine, name)(*wanted, positions, *maps, *scalars)
    for i in range(len(wanted)):
        for got, want in zip(ours[i], wanted[i], strict=True):
            if got.dtype == torch.bfloat16:  # a NaN's bits, too
                got, want = got.view(torch.int16), want.view(torch.int16)
            assert_bits(got.cpu(), want, f"list {i}")


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


@pytest.mark.parametrize("rows", [8, 9, 17, 63, 65, 255])
def test_counts_of_rows(place, rows):
    """Around every tile and block edge, in bf16; kernels with a block per row do not care, and are quick."""
    x, y = (randn(rows, 72, dtype=torch.bfloat16) for _ in range(2))
    _, rstd = check("rms_norm_forward", (x, None, 1e-5, 0.0), place)
    check("rms_norm_backward", (y, x, None, rstd.cpu(), 0.0), place, slack=8, atol=1e-6)
    check("swiglu_backward", (x, y, x, "silu", sorted_choice(72, 9)), place)
    check("cross_entropy_chunk_", (x, torch.randint(0, 72, (rows,)), 0.3, True), place, mutated=(0,), slack=2)
    check("submatrix_scatter_add_", (x, sorted_choice(72, 9), randn(rows, 9)), place, mutated=(0,))
    q, k = (t.view(1, rows, 9, 8).transpose(1, 2) for t in (x, y))
    check("rope_rotate", (q, k, randn(1, rows, 8), randn(1, rows, 8), False), place)


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


# --- four bits -------------------------------------------------------------------------------------------------------


def weight(rows, columns, dtype=torch.float32):
    """Random weights with a block of zeros, denormals, one large value and exact ties."""
    w = torch.randn(rows, columns)
    flat = w.view(-1)
    flat[32:64] = 0
    if flat.numel() > 200:
        flat[128:160] = torch.randn(32) * 1e-40
        flat[170] = 300.0
        flat[180:185] = torch.tensor([1.0, -1.0, 0.5, -0.0, 0.25])
    return w.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("rows, columns", [(4, 64), (3, 100), (1, 1), (1, 129), (3, 4097), (0, 8)])
def test_quantize_4bit(place, dtype, quant_type, blocksize, rows, columns):
    w = weight(rows, columns, dtype)
    wanted = RAW_OPS["quantize_4bit"].reference(w, quant_type, blocksize)
    for got, want in zip(RAW_OPS["quantize_4bit"](w.to(place), quant_type, blocksize), wanted, strict=True):
        assert_bits(got.cpu(), want)


def test_quantize_refuses_infinity(place):
    for value in (float("nan"), float("inf"), -float("inf")):
        w = torch.randn(3, 70)
        w[2, 69] = value
        with pytest.raises(ValueError, match="w: wanted finite values"):
            RAW_OPS["quantize_4bit"](w.to(place), "nf4", 64)


def packed_weight(out, width, blocksize, quant_type="nf4", nested=False):
    """Storage of a random weight and the scales it stands for."""
    packed, absmax = RAW_OPS["quantize_4bit"].reference(weight(out, width) / width**0.5, quant_type, blocksize)
    if not nested:
        return (packed, absmax, None, None), absmax
    codes, absmax, offset = quantize_absmax(absmax)
    return (packed, absmax, codes, offset), dequantize_absmax(codes, absmax, offset)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, columns, blocksize",
    [(9, 130, 32), (6, 256, 64), (5, 77, 128), (3, 9000, 64), (7, 1023, 256), (5, 2049, 4096)],
)
def test_dequantize_4bit(place, nested, dtype, rows, columns, blocksize):
    """Whole weights and rectangles at odd starts; what lies around the output stays as it was."""
    quant_type = "fp4" if rows % 2 else "nf4"
    storage, _ = packed_weight(rows, columns, blocksize, quant_type, nested)
    for row, column, height, width in ((0, 0, rows, columns), (1, 3, rows - 1, 41), (rows - 1, 8, 1, 64), (0, 5, 0, 7)):
        big = torch.full((rows + 2, columns + 16), 77.0, dtype=dtype)
        args = (*storage, quant_type, blocksize, columns, row, column)
        wanted = big.clone()
        dequantize_4bit_.reference(wanted[1 : 1 + height, 8 : 8 + width], *args)
        got = big.to(place)
        dequantize_4bit_(got[1 : 1 + height, 8 : 8 + width], *moved(args, place))
        assert_bits(got.cpu(), wanted, f"rectangle at {row}, {column}")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns, blocksize", [(256, 64), (77, 32), (130, 128), (2, 4096)])
def test_dequantize_4bit_stack(place, nested, dtype, columns, blocksize):
    """Weights below each other, more of them than one launch takes, and one of no rows; margins stay as they were."""
    counts = [3, 1, 0, 8, 5, 1, 2, 2, 1, 9, 1]
    made = [packed_weight(count, columns, blocksize, "nf4", nested and count > 0)[0] for count in counts]
    if nested:
        nothing = (torch.empty(0, dtype=torch.uint8), torch.empty(0), torch.empty(0, dtype=torch.uint8), torch.ones(()))
        made = [storage if count else nothing for storage, count in zip(made, counts, strict=True)]
    lists = [[storage[i] for storage in made] for i in range(4 if nested else 2)] + ([] if nested else [[], []])
    big = torch.full((sum(counts), columns + 64), 7.0, dtype=dtype)
    wanted = big.clone()
    RAW_OPS["dequantize_4bit_stack_"].reference(wanted[:, :columns], *lists, "nf4", blocksize)
    got = big.to(place)
    RAW_OPS["dequantize_4bit_stack_"](got[:, :columns], *moved(lists, place), "nf4", blocksize)
    assert_bits(got.cpu(), wanted)


# What the tensor cores multiply are levels rounded to 16 bits: 1.3e-3 in bf16 on top of the output's 1.66e-3.
GATES = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-6}


def stands_for(storage, scales, blocksize, quant_type, out, width):
    """A packed weight in float64."""
    nibbles = torch.stack((storage[0] >> 4, storage[0] & 15), dim=1).view(-1)[: out * width].long()
    exact = levels(quant_type).double()[nibbles] * scales.double().repeat_interleave(blocksize)[: out * width]
    return exact.view(out, width)


def assert_within_gate(y, wanted):
    if wanted.numel():
        gate = GATES[y.dtype] * (1 if y.numel() >= 1000 else 2)  # a few numbers may all round the same way
        error = float((y.double() - wanted).norm() / wanted.norm())
        assert error <= gate, f"{y.shape[0]} rows: relative error {error:.2e}, allowed {gate:.1e}"


@pytest.fixture
def scratch(place, monkeypatch):
    """Emulated blocks share tiles, as those of a GPU do. Each call has counters of its own, and leaves them zero."""
    made = []

    def split_scratch(x, rows):
        counters, sums = _native.module().quantized_linear_scratch(-1, x.shape[0], rows, x.shape[1])
        if not sums:
            return None, None
        made.append(torch.zeros(counters, dtype=torch.int64))
        return made[-1], torch.full((sums,), float("nan"))

    if _native.module().isa() == "simt":
        monkeypatch.setattr("inlay.ops.quantized_linear.split_scratch", split_scratch)
    yield
    assert not any(bool(counters.any()) for counters in made)


#: out, width, blocksize of products whose tiles several blocks share, on the two multiprocessors of the emulation
SHARED = [(5, 3648, 64), (20, 4160, 128), (197, 1088, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "out, width, blocksize",
    [
        (48, 256, 64),
        (33, 1152, 128),
        (19, 100, 64),
        (13, 77, 32),
        (1, 64, 32),
        (64, 1, 64),
        (21, 192, 64),
        (16, 64, 4096),
        *SHARED,
    ],
)
def test_quantized_linear(place, scratch, dtype, out, width, blocksize):
    shared = (out, width, blocksize) in SHARED
    if shared and dtype == torch.float32:
        pytest.skip("only tensor cores share tiles")
    nested, quant_type = width % 2 == 0, "fp4" if out % 2 else "nf4"
    storage, scales = packed_weight(out, width, blocksize, quant_type, nested)
    exact = stands_for(storage, scales, blocksize, quant_type, out, width)
    bias = randn(out, dtype=dtype) if out % 3 == 0 else None
    for rows in (1, 9, 17, 40) if shared else (0, 1, 2, 7, 8, 9, 16, 17, 63, 64, 65):
        x = randn(rows, width, dtype=dtype)
        args = (x, *storage, bias, quant_type, blocksize, out)
        y = RAW_OPS["quantized_linear_small"](*moved(args, place)).cpu()
        wanted = torch.nn.functional.linear(x.double(), exact, None if bias is None else bias.double())
        assert y.dtype == dtype and y.shape == (rows, out)
        assert_within_gate(y, wanted)


@pytest.mark.parametrize(
    "rows, out, width, parts",
    [
        (1, 20, 3520, 0),  # a share would be less than what a block loads at once
        (1, 96, 4096, 0),  # a tile for each of the six blocks that are resident
        (8, 5, 3648, 2),  # one tile, and not all rows of it; the last chunk is one piece long
        (17, 5, 3648, 4),
        (40, 5, 3648, 4),  # two groups of tokens, two blocks each
        (7, 3, 12352, 6),
        (16, 3, 12352, 4),
        (2, 20, 4160, 5),  # two blocks and three: the second has the end of one tile and the beginning of another
        (1, 197, 1088, 4),  # stretches of seven chunks over tiles of three: the second is a part, a tile, a part
        (9, 197, 1088, 4),
        (64, 197, 1088, 4),
        (63, 20, 4160, 0),  # a block for each tile of a group
    ],
)
def test_tiles_that_blocks_share(emulated, rows, out, width, parts):
    """Whichever block comes last, the same bits; and as many parts are handed in as the line is cut into."""
    storage, scales = packed_weight(out, width, 64, nested=True)
    x, bias = randn(rows, width, dtype=torch.bfloat16), randn(out, dtype=torch.bfloat16)
    tables = levels("nf4"), *storage[1:3], dynamic_map(), storage[3]
    counters, sums = emulated.quantized_linear_scratch(-1, rows, out, width)
    assert bool(sums) == bool(parts)

    def product(order, fewer=0):
        y, used = torch.full((rows, out), float("nan"), dtype=torch.bfloat16), torch.full((sums,), float("nan"))
        zeros = torch.zeros(counters, dtype=torch.int64)
        emulated.set_isa(order)
        emulated.quantized_linear(y, x, storage[0], *tables, bias, zeros, used[fewer:], 64)
        assert not zeros.any()
        return y, int((~used.isnan()).sum())

    with _native.using(emulated):
        results = [product(order) for order in ("simt-forward", "simt-reverse", "simt-random:1", "simt-random:2")]
        whole, none = product("simt-random", fewer=1) if parts else results[0]
    assert none == 0
    exact = x.double() @ stands_for(storage, scales, 64, "nf4", out, width).t() + bias.double()
    tile = 16 * (8 if rows <= 8 else 16 if rows <= 16 else 32)
    for y, written in results:
        assert_bits(y, results[0][0])
        assert written == parts * tile
    assert_within_gate(results[0][0], exact)
    assert_within_gate(whole, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "out, width, blocksize, rank, tokens",
    [
        (48, 256, 64, 16, (0, 1, 9, 40)),
        (33, 1152, 128, 1, (9, 17)),
        (19, 100, 64, 8, (1, 5, 65)),
        (20, 64, 64, 4, (2, 64)),
        (17, 128, 4096, 40, (9, 17)),
        (18, 64, 64, 64, (8,)),
        (16, 64, 64, 256, (2,)),
        (20, 4160, 128, 16, (1, 9, 17)),
        (5, 3648, 64, 4, (40,)),
    ],
)
def test_quantized_lora_linear(place, scratch, dtype, out, width, blocksize, rank, tokens):
    """Both kernels of a linear with LoRA, in fp32 up to the one rounding that y has."""
    if (out, width, blocksize) in SHARED and dtype == torch.float32:
        pytest.skip("only tensor cores share tiles")
    storage, scales = packed_weight(out, width, blocksize, nested=True)
    exact = stands_for(storage, scales, blocksize, "nf4", out, width)
    bias = randn(out, dtype=dtype) if out % 3 == 0 else None
    a, b = randn(rank, width, spread=width**-0.5), randn(out, rank, spread=rank**-0.5)
    on_kernels = place.type == "cuda" or _native.module().isa() == "simt"
    op = fused_lora if on_kernels else RAW_OPS["quantized_lora_linear_small"]
    for rows in tokens:
        x = randn(rows, width, dtype=dtype)
        y = op(*moved((x, *storage, bias, a, b, 0.7, "nf4", blocksize, out), place)).cpu()
        wanted = x.double() @ (exact + 0.7 * b.double() @ a.double()).t()
        wanted = wanted if bias is None else wanted + bias.double()
        assert y.dtype == dtype and y.shape == (rows, out)
        assert_within_gate(y, wanted)
    if on_kernels:  # a rank of 0 is no branch at all
        none = op(*moved((x, *storage, bias, a[:0], b[:, :0], 0.7, "nf4", blocksize, out), place))
        plain = RAW_OPS["quantized_linear_small"](*moved((x, *storage, bias, "nf4", blocksize, out), place))
        assert_bits(none.cpu(), plain.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, width, out, rank",
    [
        (1, 256, 48, 16),
        (5, 77, 33, 3),
        (9, 1160, 260, 8),
        (0, 8, 8, 2),
        (7, 129, 31, 40),
        (2, 64, 9, 256),
        (17, 72, 64, 64),
    ],
)
def test_lora_add(place, dtype, rows, width, out, rank):
    x, y = randn(rows, width, dtype=dtype), randn(rows, out, dtype=dtype)
    a, b = randn(rank, width, spread=width**-0.5), randn(out, rank, spread=rank**-0.5)
    on_kernels = place.type == "cuda" or _native.module().isa() == "simt"
    add = add_in_two_launches if on_kernels else RAW_OPS["lora_add_"]
    for view in (y, padded_rows(y)):
        target = view.to(place) if place.type == "cuda" else view  # in the memory it has
        before = target.double().cpu()
        add(target, *moved((x, a, b, 0.7), place))
        exact = before + 0.7 * (x.double() @ a.double().t()) @ b.double().t()
        assert_as_good(target.cpu(), exact.to(dtype), exact, "lora_add_", slack=4)


def test_quantized_linear_is_reproducible(place):
    storage, _ = packed_weight(80, 1280, 64)
    args = moved((randn(5, 1280, dtype=torch.bfloat16), *storage, None, "nf4", 64, 80), place)
    first = RAW_OPS["quantized_linear_small"](*args)
    assert_bits(RAW_OPS["quantized_linear_small"](*args).cpu(), first.cpu())


def test_round_trip_at_one_place(place):
    """Quantized and dequantized at the same place: within half the widest gap between levels."""
    w = weight(5, 640, torch.bfloat16)
    packed, absmax = RAW_OPS["quantize_4bit"](w.to(place), "nf4", 64)
    with force_path(None):
        dense = dequantize_4bit(packed, absmax, "nf4", 64, 5, 640, torch.float32).cpu()
    spread = absmax.cpu().repeat_interleave(64).view(5, 640)
    assert bool(((dense - w.float()).abs() <= 0.152 * spread + 1e-38).all())


# --- where things lie in memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", range(1, 8))
def test_rows_that_start_anywhere(place, shift):
    """16-byte loads must not be used for them; UBSan looks on."""
    x = randn(6, 264, dtype=torch.bfloat16)
    whole = x[:, shift : shift + 256].to(place)
    view = x.to(place)[:, shift : shift + 256]
    assert view.data_ptr() % 16 != 0
    for name, args, close in (
        ("swiglu_forward", lambda t: (t, t, "silu"), False),
        ("submatrix_add", lambda t: (t, torch.ones(6, 256, device=t.device)), False),
        ("cross_entropy_chunk_", lambda t: (t, torch.arange(6, device=t.device), 1.0, False), True),
        ("rms_norm_forward", lambda t: (t, None, 1e-5, 0.0), True),
    ):
        got, wanted = outputs(RAW_OPS[name], args(view), ()), outputs(RAW_OPS[name], args(whole.contiguous()), ())
        if close:  # lanes add other elements then
            torch.testing.assert_close(got, wanted)
        else:
            assert_bits(got[0].cpu(), wanted[0].cpu(), name)


FAR = (1 << 31) + 64


def far_apart(path, values):
    """The same rows, each beginning 2^31 elements behind the other, in a file of which only these pages exist."""
    size = (values.shape[0] - 1) * FAR + values.shape[1]
    memory = torch.from_file(str(path), shared=True, size=size, dtype=values.dtype)
    view = memory.as_strided(values.shape, (FAR, 1))
    view.copy_(values)
    return view


def test_rows_beyond_32_bits(place, tmp_path):
    """An index of 32 bits would land in a hole of zeros, or outside."""
    if place.type != "cpu":
        pytest.skip("tests/gpu has its own")
    x, indices = randn(3, 40, dtype=torch.bfloat16), torch.tensor([0, 7, 39])
    far = far_apart(tmp_path / "x", x)
    for name, args in (
        ("swiglu_forward", lambda t: (t, t, "silu")),
        ("submatrix_gather", lambda t: (t, indices, torch.float32)),
        ("cross_entropy_chunk_", lambda t: (t, torch.tensor([1, 2, 3]), 1.0, False)),
    ):
        assert_bits(RAW_OPS[name](*args(far)), RAW_OPS[name](*args(x.clone())), name)
    got, wanted = (RAW_OPS["rms_norm_forward"](t, None, 1e-5, 0.0)[0] for t in (far, x))
    assert_bits(got, wanted, "rms_norm_forward")
    acc = randn(3, 3)
    RAW_OPS["submatrix_scatter_add_"](far, indices, acc)
    RAW_OPS["submatrix_scatter_add_"](x, indices, acc)
    assert_bits(far.clone(), x, "submatrix_scatter_add_")
    if _native.module().isa() == "simt":
        assert_bits(narrow_grad(far, far[:, :8], 1), narrow_grad(x, x[:, :8], 1), "submatrix_grad")


def test_weights_beyond_32_bits(place, tmp_path):
    """A rectangle at the end of a weight of 2^33 codes."""
    if place.type != "cpu":
        pytest.skip("tests/gpu has its own")
    rows, columns = (1 << 20) + 1, 1 << 13
    (packed, absmax, _, _), _ = packed_weight(1, columns, 64)
    files = {"packed": rows * columns // 2, "absmax": rows * columns // 64}
    big = {
        name: torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=part.dtype)
        for (name, size), part in zip(files.items(), (packed, absmax))
    }
    big["packed"][-packed.numel() :] = packed
    big["absmax"][-absmax.numel() :] = absmax
    got, wanted = torch.empty(1, columns), torch.empty(1, columns)
    dequantize_4bit_(got, big["packed"], big["absmax"], None, None, "nf4", 64, columns, rows - 1, 0)
    dequantize_4bit_(wanted, packed, absmax, None, None, "nf4", 64, columns, 0, 0)
    assert_bits(got, wanted)
