"""Blockwise 4-bit and 8-bit, and row-wise int8 quantization, in bitsandbytes' storage bit for bit.

4 bits (NF4, FP4): a weight of N elements in C order is cut into blocks of `blocksize`, blocks straddling rows.
  absmax[b] = max |w| in block b           code = the level nearest to w / absmax[b] (ties to the lower level)
  packed[i] = code[2i] << 4 | code[2i+1]   w' = round(levels[code] · absmax[b])        fp32 product, one rounding
NF4: Dettmers et al., 2023, arXiv:2305.14314. FP4: bitsandbytes' own four-bit float.

Double quantization stores absmax - offset, offset = mean(absmax), in 8 bits over blocks of 256 with the signed
dynamic map (Dettmers et al., 2022, arXiv:2110.02861); absmax = round(map[code8] · absmax2) + offset, two roundings.

Rounding rules are those of bitsandbytes on a CPU: full blocks multiply by the fp32 reciprocal of absmax, a tail
block divides; a block of zeros gets the code of 0 under a divisor of 1e-38.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from inlay._native import module
from inlay.ops._registry import fail, raw_op

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256  # bitsandbytes' choice for the absmax of absmax, fixed in its file format
_SMALLEST = 1e-38  # bitsandbytes' stand-in for the absmax of a block of zeros

#: Levels by code, fp32. NF4's are quantiles of N(0, 1) scaled to [-1, 1]; FP4's are +-{0, 1/192, 1/6, 1/4, 1/3, 1/2,
#: 2/3, 1} as bitsandbytes divides them out of 12; both its zeros are positive.
_LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": tuple(v / 12.0 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)),
}
QUANT_TYPES = tuple(_LEVELS)


_CPU = torch.device("cpu")


@functools.cache
def levels(quant_type: str, device: torch.device = _CPU) -> Tensor:
    """The 16 fp32 levels of "nf4" or "fp4" by code. Do not write to it."""
    if quant_type not in _LEVELS:
        fail("quantize_4bit", "quant_type", f"one of {QUANT_TYPES}", repr(quant_type), "choose one of them")
    return torch.tensor(_LEVELS[quant_type], dtype=torch.float32).to(device)


@functools.cache
def _bounds(quant_type: str) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbouring levels [15], and codes in the order of their levels [16]."""
    table = levels(quant_type)
    order = torch.argsort(table, stable=True)
    return (table[order[:-1]] + table[order[1:]]) / 2, order


@functools.cache
def dynamic_map(device: torch.device = _CPU, signed: bool = True) -> Tensor:
    """The 8-bit dynamic map: 256 sorted fp32 levels with 0 to 6 exponent bits (arXiv:2110.02861)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        scale = 10 ** (exponent - 6)
        values += (scale * means).tolist() + ((-scale * means).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32).to(device)


def check_blocksize(op: str, blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        fail(op, "blocksize", f"one of {BLOCKSIZES}", blocksize, "64 is the usual choice")


def _check_finite(op: str, absmax: Tensor) -> None:
    """A scale is finite if and only if all weights of its block are. Shapes alone (meta) have no values."""
    if not absmax.is_meta and not bool(torch.isfinite(absmax).all()):
        fail(
            op, "w", "finite values", "NaN or infinity", "a weight like this cannot be quantized; check the checkpoint"
        )


def _blocks(numel: int, blocksize: int) -> int:
    return -(-numel // blocksize)


# --- 4 bits -----------------------------------------------------------------------------------------------------------


def _check_4bit(w: Tensor, quant_type: str, blocksize: int) -> None:
    check_blocksize("quantize_4bit", blocksize)
    levels(quant_type)
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        fail("quantize_4bit", "w", "float32, bfloat16 or float16", w.dtype, "cast it first", TypeError)


def _quantize_4bit_native(w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    _check_4bit(w, quant_type, blocksize)
    flat = w.detach().reshape(-1)
    packed, absmax = _quantize_4bit_fake(flat, quant_type, blocksize)
    bounds, order = _bounds(quant_type)
    tables = bounds.to(w.device), order.to(w.device, torch.uint8)
    module().quantize_4bit(packed, absmax, flat, *tables, blocksize)
    _check_finite("quantize_4bit", absmax)
    return packed, absmax


def _quantize_4bit_fake(w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    packed = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
    return packed, w.new_empty(_blocks(w.numel(), blocksize), dtype=torch.float32)


@raw_op(native=_quantize_4bit_native, fake=_quantize_4bit_fake)
def quantize_4bit(w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """w [...] float -> packed uint8 [ceil(numel/2)], absmax fp32 [ceil(numel/blocksize)]."""
    _check_4bit(w, quant_type, blocksize)
    flat = w.detach().reshape(-1).float()
    full = flat.numel() - flat.numel() % blocksize
    body, tail = flat[:full].view(-1, blocksize), flat[full:]
    absmax = body.abs().amax(dim=1)
    scaled = (body * (1.0 / absmax.clamp(min=_SMALLEST)[:, None])).reshape(-1)
    if tail.numel():
        last = tail.abs().amax().clamp(min=_SMALLEST).reshape(1)
        absmax, scaled = torch.cat((absmax, last)), torch.cat((scaled, tail / last))
    _check_finite("quantize_4bit", absmax)
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    bounds, order = (t.to(w.device) for t in _bounds(quant_type))
    codes = order[torch.bucketize(scaled.clamp(-1, 1), bounds)].to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], absmax


def check_packed(
    op: str,
    packed: Tensor,
    absmax: Tensor,
    codes: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    rows: int,
    columns: int,
) -> None:
    """The storage of a [rows, columns] weight must have the sizes its shape and blocksize call for."""
    check_blocksize(op, blocksize)
    numel = rows * columns
    if packed.dtype != torch.uint8 or packed.numel() != (numel + 1) // 2:
        wanted = f"{(numel + 1) // 2} bytes of uint8 for [{rows}, {columns}]"
        fail(op, "packed", wanted, f"{packed.numel()} of {packed.dtype}", "check the shape the weight was packed with")
    blocks = _blocks(numel, blocksize)
    if codes is not None and (codes.dtype != torch.uint8 or codes.numel() != blocks):
        fail(op, "codes", f"{blocks} uint8 scales", f"{codes.numel()} of {codes.dtype}", "check blocksize and shape")
    scales = blocks if codes is None else _blocks(blocks, NESTED_BLOCKSIZE)
    if absmax.dtype != torch.float32 or absmax.numel() != scales:
        fail(
            op, "absmax", f"{scales} float32 scales", f"{absmax.numel()} of {absmax.dtype}", "check blocksize and shape"
        )
    if codes is not None and (offset is None or offset.dtype != torch.float32 or offset.numel() != 1):
        got = None if offset is None else f"{offset.numel()} of {offset.dtype}"
        fail(op, "offset", "one float32 number", got, "pass the mean that was taken from the scales")


def _dequantize_4bit_native(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codes: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    columns: int,
    row: int,
    column: int,
) -> None:
    table = dynamic_map(out.device) if codes is not None else None
    flat = packed.reshape(-1)
    module().dequantize_4bit(
        out, flat, levels(quant_type, out.device), absmax, codes, table, offset, blocksize, columns, row, column
    )


@raw_op(native=_dequantize_4bit_native, fake=lambda *args: None, mutates=("out",))
def dequantize_4bit_(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codes: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    columns: int,
    row: int,
    column: int,
) -> None:
    """Write W[row:, column:] of a packed [.., columns] weight into out [R, C] float: round(level·absmax).

    absmax fp32 [blocks]; or, doubly quantized, codes uint8 [blocks], absmax fp32 [ceil(blocks/256)], offset fp32 [].
    """
    scales = absmax if codes is None else dequantize_absmax(codes, absmax, offset)
    rows = torch.arange(row, row + out.shape[0], device=out.device)
    index = rows[:, None] * columns + torch.arange(column, column + out.shape[1], device=out.device)
    byte = packed.reshape(-1)[index // 2]
    code = torch.where(index % 2 == 0, byte >> 4, byte & 15)
    out.copy_(levels(quant_type).to(out.device)[code.long()] * scales[index // blocksize])


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    codes: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The dense weight [rows, columns] in `dtype`."""
    check_packed("dequantize_4bit", packed, absmax, codes, offset, blocksize, rows, columns)
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    dequantize_4bit_(out, packed, absmax, codes, offset, quant_type, blocksize, columns, 0, 0)
    return out


# --- 8 bits, for the scales of the scales -----------------------------------------------------------------------------


_GRID = 65535  # bitsandbytes codes 8 bits on a CPU through a table over this many steps of [-1, 1]


@functools.cache
def _grid_codes() -> Tensor:
    """Code of the level nearest to each point of the grid, uint8 [65536]; a tie goes to the lower level."""
    points = torch.linspace(-1, 1, _GRID + 1, dtype=torch.float64).float()
    table = dynamic_map()
    above = torch.searchsorted(table, points).clamp(1, 255)
    nearer_below = points - table[above - 1] <= table[above] - points
    return torch.where(nearer_below, above - 1, above).to(torch.uint8)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax fp32 [blocks] -> codes uint8 [blocks], absmax2 fp32 [ceil(blocks/256)], offset fp32 []."""
    offset = absmax.mean()
    shifted = absmax - offset
    pad = -absmax.numel() % NESTED_BLOCKSIZE
    blocks = torch.nn.functional.pad(shifted, (0, pad)).view(-1, NESTED_BLOCKSIZE)
    absmax2 = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax2)[:, None] + 1.0) * (_GRID / 2) + 0.5
    scaled = torch.where(absmax2[:, None] > 0, scaled, torch.zeros_like(scaled))  # a block of zeros gets code 0
    codes = _grid_codes().to(absmax.device)[scaled.reshape(-1)[: absmax.numel()].long().clamp(0, _GRID)]
    return codes, absmax2, offset


def dequantize_absmax(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """Inverse of :func:`quantize_absmax`: fp32 [blocks] = round(map[code]·absmax2) + offset, each op rounded."""
    scales = absmax2.repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    return dynamic_map().to(codes.device)[codes.long()] * scales + offset


# --- int8, one scale per row ------------------------------------------------------------------------------------------


_INT8_SPAN = 1 << 18  # weights dequantized at a time: 1 MiB of fp32, instead of a whole weight of it


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] float -> codes int8 [N, K], row absmax fp32 [N]: codes = round(w·127 / absmax) (arXiv:2208.07339)."""
    wide = w.detach().float()
    absmax = wide.abs().amax(dim=1)
    _check_finite("quantize_int8", absmax)
    scale = torch.where(absmax > 0, 127.0 / absmax, torch.zeros_like(absmax))
    return (wide * scale[:, None]).round().to(torch.int8), absmax


def dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """codes int8 [N, K], row absmax fp32 [N] -> [N, K] in `dtype`: code·absmax·(1/127), both products fp32."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows = max(1, _INT8_SPAN // max(1, codes.shape[1]))
    for row in range(0, codes.shape[0], rows):
        part = codes[row : row + rows].float().mul_(absmax[row : row + rows, None]).mul_(1.0 / 127.0)
        out[row : row + rows].copy_(part)
    return out
