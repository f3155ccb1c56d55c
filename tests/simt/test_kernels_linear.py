"""Few rows times a four-bit weight, with and without LoRA (test_kernels_blocks.py says in which places)."""

from __future__ import annotations

import pytest
import torch
from _compare import DTYPES, assert_as_good, assert_bits, padded_rows
from _kernels import assert_within_gate, moved, packed_weight, randn, stands_for

from inlay import _native
from inlay.ops._registry import RAW_OPS
from inlay.ops.lora_linear import add_in_two_launches
from inlay.ops.quantize_blockwise import dynamic_map, levels
from inlay.ops.quantized_linear import fused_lora


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
        wide = None if bias is None else bias.double()
        wanted = torch.nn.functional.linear(x.double(), exact, wide)
        rounded = torch.nn.functional.linear(x.double(), exact.to(dtype).double(), wide)
        assert y.dtype == dtype and y.shape == (rows, out)
        assert_within_gate(y, wanted, rounded if dtype == torch.bfloat16 and place.type == "cpu" else None)


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
        plain = (before.float() + 0.7 * (x.float() @ a.t()) @ b.t()).to(dtype)
        assert_as_good(target.cpu(), plain, exact, "lora_add_", slack=4)


def test_quantized_linear_is_reproducible(place):
    storage, _ = packed_weight(80, 1280, 64)
    args = moved((randn(5, 1280, dtype=torch.bfloat16), *storage, None, "nf4", 64, 80), place)
    first = RAW_OPS["quantized_linear_small"](*args)
    assert_bits(RAW_OPS["quantized_linear_small"](*args).cpu(), first.cpu())
