"""The optimizer's kernels, bit for bit or against float64 (test_kernels_blocks.py says in which places)."""

from __future__ import annotations

import importlib

import pytest
import torch
from _compare import assert_as_good, assert_bits
from _kernels import moved, randn, widened

from inlay import _native
from inlay.ops._registry import RAW_OPS
from inlay.ops.quantize_blockwise import dynamic_map


@pytest.fixture
def scalar_engine():
    """The CPU engine, on its scalar kernels."""
    engine = importlib.import_module("inlay._C")
    engine.set_isa("scalar")
    yield engine
    engine.set_isa("")


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
def test_adamw_8bit(place, scalar_engine, sizes, misaligned):
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
    for step in (3, 4):
        scalars = (0.03, 0.8, 0.95, 1e-6, 0.1, step, 0.5)
        RAW_OPS["adamw_8bit_step_"](*ours, *scalars)
        scalar_engine.adamw_8bit_step(*wanted, *maps, *scalars)
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
def test_adamw_bf16(place, scalar_engine, sizes, misaligned, gradients, rounding, states):
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
    for step in (3, 4):
        scalars = (0.03, 0.8, 0.95, 1e-6, 0.1, step, 0.5, -7)
        RAW_OPS[f"{name}_"](*ours, positions, *scalars)
        getattr(scalar_engine, name)(*wanted, positions, *maps, *scalars)
    for i in range(len(wanted)):
        for got, want in zip(ours[i], wanted[i], strict=True):
            if got.dtype == torch.bfloat16:  # a NaN's bits, too
                got, want = got.view(torch.int16), want.view(torch.int16)
            assert_bits(got.cpu(), want, f"list {i}")
