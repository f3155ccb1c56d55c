"""Four-bit quantization and its inverse, bit for bit (test_kernels_blocks.py says in which places)."""

from __future__ import annotations

import pytest
import torch
from _compare import DTYPES, assert_bits
from _kernels import moved, packed_weight, weight

from inlay.ops import force_path
from inlay.ops._registry import RAW_OPS
from inlay.ops.quantize_blockwise import dequantize_4bit, dequantize_4bit_


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


def test_round_trip_at_one_place(place):
    """Quantized and dequantized at the same place: within half the widest gap between levels."""
    w = weight(5, 640, torch.bfloat16)
    packed, absmax = RAW_OPS["quantize_4bit"](w.to(place), "nf4", 64)
    with force_path(None):
        dense = dequantize_4bit(packed, absmax, "nf4", 64, 5, 640, torch.float32).cpu()
    spread = absmax.cpu().repeat_interleave(64).view(5, 640)
    assert bool(((dense - w.float()).abs() <= 0.152 * spread + 1e-38).all())
