"""Four-bit and int8 storage: its definition in float64, native against reference byte for byte, and bad input."""

import pytest
import torch
from _compare import DTYPES, assert_bits

from inlay import _native, ops
from inlay.ops._registry import RAW_OPS
from inlay.ops.quantize_blockwise import (
    BLOCKSIZES,
    QUANT_TYPES,
    dequantize_4bit,
    dequantize_4bit_,
    dequantize_absmax,
    dequantize_int8,
    dynamic_map,
    levels,
    quantize_4bit,
    quantize_absmax,
    quantize_int8,
)

# rows, columns: whole blocks, straddling rows, one element, odd counts, a tail of one
SHAPES = [(4, 64), (3, 100), (1, 1), (7, 9), (1, 129), (5, 4097), (0, 8)]


def weight(rows, columns, dtype=torch.float32):
    """Random weights with what breaks quantizers: a block of zeros, denormals, one large value, exact ties."""
    w = torch.randn(rows, columns)
    flat = w.view(-1)
    flat[32:64] = 0
    if flat.numel() > 200:
        flat[128:160] = torch.randn(32) * 1e-40
        flat[170] = 300.0
        flat[180:185] = torch.tensor([1.0, -1.0, 0.5, -0.0, 0.25])
    return w.to(dtype)


def plain_quantize(w, quant_type, blocksize):
    """The definition, block by block, in Python."""
    table, flat = levels(quant_type).double(), w.reshape(-1).float()
    codes, absmax = [], []
    for start in range(0, flat.numel(), blocksize):
        block = flat[start : start + blocksize]
        absmax.append(float(block.abs().max()))
        scale = max(absmax[-1], 1e-38)
        distance = ((block.double() / scale)[:, None] - table).abs()
        codes.append((distance, distance.min(dim=1).values))
    return codes, absmax


def test_levels():
    nf4, fp4 = levels("nf4"), levels("fp4")
    assert nf4.tolist() == sorted(nf4.tolist()) and nf4[7] == 0 and nf4[0] == -1 and nf4[15] == 1
    assert fp4[1:8].tolist() == [-v for v in fp4[9:].tolist()] and fp4[0] == fp4[8] == 0 and fp4.abs().max() == 1
    table = dynamic_map()
    assert table.numel() == 256 and bool((table.diff() > 0).all()) and 0.0 in table.tolist() and table[-1] == 1


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("rows, columns", [(4, 64), (3, 100), (7, 9)])
def test_every_code_is_a_nearest_level(path, quant_type, rows, columns):
    """Against float64; where two levels are almost as near, either will do."""
    w = weight(rows, columns)
    packed, absmax = quantize_4bit(w, quant_type, 32)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[: w.numel()].long()
    wanted, scales = plain_quantize(w, quant_type, 32)
    for block, (distance, nearest) in enumerate(wanted):
        mine = distance.gather(1, codes[32 * block : 32 * block + len(nearest), None])[:, 0]
        assert bool((mine <= nearest + 1e-6).all())
    full = w.numel() // 32
    assert absmax[:full].tolist() == scales[:full]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_native_has_the_references_bytes(path, dtype, quant_type, blocksize, rows, columns):
    w = weight(rows, columns, dtype)
    packed, absmax = quantize_4bit(w, quant_type, blocksize)
    with ops.force_path("reference"):
        wanted_packed, wanted_absmax = quantize_4bit(w, quant_type, blocksize)
    assert_bits(packed, wanted_packed, "packed")
    assert_bits(absmax, wanted_absmax, "absmax")
    for out in DTYPES:
        dense = dequantize_4bit(packed, absmax, quant_type, blocksize, rows, columns, out)
        with ops.force_path("reference"):
            wanted = dequantize_4bit(packed, absmax, quant_type, blocksize, rows, columns, out)
        assert_bits(dense, wanted, f"dequantized, {out}")


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(path, blocksize):
    w = weight(3, 3000)
    packed, absmax = quantize_4bit(w, "nf4", blocksize)
    assert packed.numel() == 4500 and absmax.numel() == -(-9000 // blocksize)
    dense = dequantize_4bit(packed, absmax, "nf4", blocksize, 3, 3000, torch.float32)
    spread = absmax.repeat_interleave(blocksize)[:9000].view(3, 3000)
    assert bool(((dense - w).abs() <= 0.152 * spread + 1e-38).all())  # half the widest gap between levels


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_values_just_around_every_bound(path, quant_type):
    """One float to either side of each midpoint, in a full and in a tail block: ties go to the lower level."""
    table = levels(quant_type).sort().values
    bounds = (table[:-1] + table[1:]) / 2
    near = torch.cat([bounds, *(torch.nextafter(bounds, torch.tensor(s)) for s in (-9.0, 9.0))])
    block = torch.nn.functional.pad(near, (0, 64 - near.numel() - 1), value=0.1)
    w = torch.cat((block, torch.ones(1), block[:60], torch.ones(1)))  # absmax is 1 in both
    packed, absmax = quantize_4bit(w, quant_type, 64)
    assert absmax.tolist() == [1.0, 1.0]
    dense = dequantize_4bit(packed, absmax, quant_type, 64, 1, w.numel(), torch.float32)[0]
    for start in (0, 64):
        assert_bits(dense[start : start + 15] + 0.0, table[:-1] + 0.0, "ties")
        assert_bits(dense[start + 15 : start + 30] + 0.0, table[:-1] + 0.0, "just below")
        assert_bits(dense[start + 30 : start + 45] + 0.0, table[1:] + 0.0, "just above")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns, blocksize", [(9, 130, 32), (6, 256, 64), (5, 77, 128)])
def test_rectangles(path, nested, dtype, rows, columns, blocksize):
    """Any rectangle, at odd starts and inside blocks, has the whole weight's bits; nothing else is written."""
    packed, absmax = quantize_4bit(weight(rows, columns), "nf4", blocksize)
    codes = offset = None
    if nested:
        codes, absmax, offset = quantize_absmax(absmax)
    whole = dequantize_4bit(packed, absmax, "nf4", blocksize, rows, columns, dtype, codes, offset)
    for row, column, height, width in (
        (0, 0, rows, columns),
        (1, 3, 2, 41),
        (2, 64, 3, 1),
        (rows - 1, 5, 1, 72),
        (0, 1, 0, 4),
    ):
        big = torch.full((height + 2, width + 7), 777.0, dtype=dtype)
        out = big[1 : height + 1, 3 : width + 3]
        dequantize_4bit_(out, packed, absmax, codes, offset, "nf4", blocksize, columns, row, column)
        assert_bits(out, whole[row : row + height, column : column + width], f"{row, column, height, width}")
        assert int((big == 777).sum()) == big.numel() - height * width


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_scales_of_scales(count):
    absmax = torch.rand(count) * 3 + 0.1
    codes, absmax2, offset = quantize_absmax(absmax)
    assert codes.dtype == torch.uint8 and codes.numel() == count and absmax2.numel() == -(-count // 256)
    assert_bits(offset, absmax.mean(), "offset")
    back = dequantize_absmax(codes, absmax2, offset)
    spread = absmax2.repeat_interleave(256)[:count]
    assert bool(((back - absmax).abs() <= 0.009 * spread + 1e-6).all())


def test_equal_scales():
    """absmax - offset is 0 everywhere: nothing to divide by."""
    codes, absmax2, offset = quantize_absmax(torch.full((300,), 0.5))
    assert_bits(dequantize_absmax(codes, absmax2, offset), torch.full((300,), 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8(dtype):
    w = weight(9, 130, dtype)
    w[2] = 0
    codes, absmax = quantize_int8(w)
    assert codes.dtype == torch.int8 and absmax.dtype == torch.float32
    assert_bits(absmax, w.float().abs().amax(dim=1))
    assert int(codes.abs().max()) == 127
    back = dequantize_int8(codes, absmax, torch.float32)
    assert bool(((back - w.float()).abs() <= absmax[:, None] * (0.501 / 127)).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_has_no_code(path, value):
    w = torch.randn(3, 70)
    w[2, 69] = value
    for quantize in (lambda: quantize_4bit(w, "nf4", 64), lambda: quantize_int8(w)):
        with pytest.raises(ValueError, match="w: wanted finite values, got NaN or infinity"):
            quantize()


def test_refuses_bad_options(path):
    w = torch.randn(2, 64)
    for blocksize in (0, -64, 16, 48, 63, 8192):
        with pytest.raises(ValueError, match=rf"blocksize: wanted one of .*, got {blocksize}"):
            quantize_4bit(w, "nf4", blocksize)
    with pytest.raises(ValueError, match="quant_type: wanted one of .*'nf4'.*, got 'nf5'"):
        quantize_4bit(w, "nf5", 64)
    with pytest.raises(TypeError, match="w: wanted float32, bfloat16 or float16, got torch.int64"):
        quantize_4bit(w.long(), "nf4", 64)


def test_refuses_storage_that_does_not_fit(path):
    packed, absmax = quantize_4bit(torch.randn(8, 64), "nf4", 64)
    codes, absmax2, offset = quantize_absmax(absmax)

    def dequantize(packed=packed, absmax=absmax, codes=None, offset=None, rows=8, blocksize=64):
        return dequantize_4bit(packed, absmax, "nf4", blocksize, rows, 64, torch.float32, codes, offset)

    for change, message in (
        ({"packed": packed[:-1]}, r"packed: wanted 256 bytes of uint8 for \[8, 64\], got 255"),
        ({"rows": 9}, r"packed: wanted 288 bytes"),
        ({"packed": packed.view(torch.int8)}, "packed: wanted .* got 256 of torch.int8"),
        ({"absmax": absmax[:-1]}, "absmax: wanted 8 float32 scales, got 7"),
        ({"absmax": absmax.half()}, "absmax: wanted 8 float32 scales, got 8 of torch.float16"),
        ({"blocksize": 32}, "absmax: wanted 16 float32 scales, got 8"),
        ({"blocksize": 60}, "blocksize: wanted one of"),
        ({"codes": codes[1:], "absmax": absmax2, "offset": offset}, "codes: wanted 8 uint8 scales, got 7"),
        ({"codes": codes, "absmax": absmax, "offset": offset}, "absmax: wanted 1 float32 scales, got 8"),
        ({"codes": codes, "absmax": absmax2}, "offset: wanted one float32 number"),
    ):
        with pytest.raises(ValueError, match=message):
            dequantize(**change)


@pytest.mark.skipif(not _native.available(), reason="no native module")
def test_the_engine_checks_sizes_itself():
    """Its callers in C++ or another language have no Python checks in front."""
    packed, absmax = quantize_4bit(torch.randn(8, 64), "nf4", 64)
    out = torch.empty(8, 64)
    for args in ((packed[:-1], absmax), (packed, absmax[:-1])):
        with pytest.raises(ValueError, match="wanted bytes and scales for 512 weights"):
            _native.module().dequantize_4bit(out, args[0], levels("nf4"), args[1], None, None, None, 64, 64, 0, 0)
    with pytest.raises(ValueError, match="a rectangle inside the weight"):
        _native.module().dequantize_4bit(out, packed, levels("nf4"), absmax, None, None, None, 64, 64, 0, 1)


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck(path, nested):
    w = torch.randn(6, 70)
    torch.library.opcheck(RAW_OPS["quantize_4bit"].overload, (w, "nf4", 64))
    packed, absmax = quantize_4bit(w, "nf4", 64)
    codes, absmax, offset = quantize_absmax(absmax) if nested else (None, absmax, None)
    args = (torch.empty(2, 33), packed, absmax, codes, offset, "nf4", 64, 70, 3, 5)
    torch.library.opcheck(RAW_OPS["dequantize_4bit_"].overload, args)


@pytest.mark.skipif(not _native.available(), reason="no native module")
def test_results_do_not_depend_on_threads():
    w = weight(301, 1203)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            packed, absmax = quantize_4bit(w, "fp4", 64)
            results.append((packed, absmax, dequantize_4bit(packed, absmax, "fp4", 64, 301, 1203, torch.bfloat16)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert_bits(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_large(path, quant_type):
    """More than 2^31 / 256 elements is not needed to see 32-bit slips in row offsets: the last row of a wide one is."""
    w = torch.randn(70, 65_537, dtype=torch.float32)
    packed, absmax = quantize_4bit(w, quant_type, 128)
    whole = dequantize_4bit(packed, absmax, quant_type, 128, 70, 65_537, torch.bfloat16)
    last = torch.empty(1, 65_537, dtype=torch.bfloat16)
    dequantize_4bit_(last, packed, absmax, None, None, quant_type, 128, 65_537, 69, 0)
    assert_bits(last, whole[69:])
