"""x·dequant(W)ᵀ + b and its input gradient, straight from four-bit storage.

Up to SMALL_ROWS rows of x, one kernel decodes weights and never writes the matrix: fp32 level·absmax, fp32 products and
sums, one rounding. For bf16 with five rows or more on AMX, and on tensor cores, weights are rounded to 16 bits first
(relative error about 2.3e-3 of the output instead of 1.7e-3). Above SMALL_ROWS,
panels of W are dequantized into a reused workspace that stays in cache
and torch.matmul takes each: weights round once to x's dtype, as bitsandbytes' do. No dense copy outlives the call.

  forward         panels of rows:     y[:, r]  = x · W[r]ᵀ + b[r]
  backward_input  panels of columns:  dx[:, c] = dy · W[:, c]         each panel is final, so nothing is added in bf16
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from inlay._native import module
from inlay.ops._registry import as_rows, check_device, check_floating, compute_dtype, in_plain_torch, raw_op
from inlay.ops.quantize_blockwise import check_packed, dequantize_4bit_, dynamic_map, levels

#: Rows of x up to which decoding in registers wins over dequantizing a panel for torch.matmul; measured on a CPU with
#: AMX at 4096 x 4096 by benchmarks/ops/bench_quantized_linear.py.
SMALL_ROWS = 16

#: The same on a GPU, with and without tensor cores (cuda/quantized_linear.cu, which takes up to 64). On an H200 it is
#: 1.3x to 1.7x as fast as the other way at 32 rows of Llama-3-8B's large linears, and at 64 no faster, or slower.
#: Without tensor cores: from counted bytes.
CUDA_SMALL_ROWS = 32
CUDA_SMALL_ROWS_PLAIN = 4

#: Bytes of one dequantized panel. At 4096 x 4096 and 64 to 512 rows, 8 MiB was best of 1 to 33 (the whole weight): up
#: to 1.9x faster than 1 MiB, since each panel is a product of its own, and no slower than no panels at all.
PANEL_BYTES = 8 << 20

#: Rows of counters that a device gets at a time, 1.6 MB on 132 multiprocessors: a stream takes one, a graph another.
COUNTER_ROWS = 512

_workspaces = threading.local()
_counters: dict[tuple[int, int, int], Tensor] = {}  # by device, stream and captured graph
_unused_counters: dict[int, list[Tensor]] = {}  # by device


def workspace(numel: int, like: Tensor) -> Tensor:
    """Scratch of `numel` elements in `like`'s dtype and device: one per thread, which grows and never shrinks.

    While tracing it is new at each call: a fake or functional tensor must not be kept for later, real, calls.
    """
    if torch.compiler.is_compiling() or not in_plain_torch((like,)):
        return like.new_empty(numel)
    held: dict = _workspaces.__dict__.setdefault("held", {})
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0  # streams must not share it
    key = like.dtype, like.device, stream
    if key not in held or held[key].numel() < numel:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            held[key] = torch.empty(max(numel, 1), dtype=like.dtype, device=like.device)
    return held[key][:numel]


@functools.cache
def _scratch_sizes(device: int, tokens: int, rows: int, columns: int) -> tuple[int, int]:
    return module().quantized_linear_scratch(device, tokens, rows, columns)


def split_scratch(x: Tensor, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """Counters and sums for a product whose tiles several blocks of the GPU share; (None, None) where none do.

    Counters are zero before and after a call, and calls that may run at the same time must not share them. Those on one
    stream never do, whatever thread makes them. A CUDA graph may be replayed beside anything, so it keeps counters of
    its own, for each stream it is captured from. The sums have no content between calls: they are the allocator's,
    which knows streams and graphs.
    """
    if not x.is_cuda:
        return None, None
    device = x.get_device()
    count, numbers = _scratch_sizes(device, x.shape[0], rows, x.shape[1])
    if not numbers:
        return None, None
    key = device, *module().current_work(device)
    counters = _counters.get(key)
    if counters is None:
        counters = _new_counters(key, count, x.device)
    return counters, torch.empty(numbers, dtype=torch.float32, device=x.device)


def _new_counters(key: tuple[int, int, int], count: int, where: torch.device) -> Tensor | None:
    """Zeros for a stream or a graph; None, so that tiles stay whole, where a graph is captured and none are left."""
    device, _, capture = key
    unused = _unused_counters.setdefault(device, [])
    if not unused and not capture:  # what is zeroed during a capture is zeroed at replays only
        # A copy from the host, unlike a kernel, is complete when it returns: any stream may use these.
        unused.extend(torch.zeros(COUNTER_ROWS, count, dtype=torch.int64).to(where).unbind())
    try:
        _counters[key] = unused.pop()
    except IndexError:  # also where another thread took the last one
        return None
    return _counters[key]


def _small_rows(x: Tensor, blocksize: int) -> int:
    """Rows of x up to which the decoding kernel is used."""
    if not x.is_cuda:
        return SMALL_ROWS
    on_tensor_cores = x.dtype != torch.float32 and x.shape[-1] % 64 == 0 and blocksize % 64 == 0
    return CUDA_SMALL_ROWS if on_tensor_cores else CUDA_SMALL_ROWS_PLAIN


def _panel_elements(like: Tensor) -> int:
    """Elements of one panel. On a GPU the whole weight, until a measurement says that smaller ones stay in L2."""
    return 1 << 62 if like.is_cuda else PANEL_BYTES // like.element_size()


def _native(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codes: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    rows: int,
) -> Tensor:
    y = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    table = dynamic_map(x.device) if codes is not None else None
    bias = bias if bias is None else bias.to(x.dtype).contiguous()
    tables = levels(quant_type, x.device), absmax, codes, table, offset
    packed = packed if packed.dim() == 1 else packed.reshape(-1)
    module().quantized_linear(y, x.contiguous(), packed, *tables, bias, *split_scratch(x, rows), blocksize)
    return y


def _fake(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codes: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    rows: int,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@raw_op(native=_native, fake=_fake)
def quantized_linear_small(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codes: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    rows: int,
) -> Tensor:
    """x [M, K] · W [rows, K]ᵀ + bias -> [M, rows] with fp32 weights, products and sums, rounded once."""
    wide = compute_dtype(x)
    weight = torch.empty(rows, x.shape[1], dtype=wide, device=x.device)
    dequantize_4bit_(weight, packed, absmax, codes, offset, quant_type, blocksize, x.shape[1], 0, 0)
    return functional.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


def fused_lora(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codes: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    quant_type: str,
    blocksize: int,
    rows: int,
) -> Tensor:
    """quantized_lora_linear_small by the two CUDA kernels, whatever device they are emulated on."""
    x, engine = x.contiguous(), module()
    y = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    inner = torch.empty(x.shape[0], a.shape[0], dtype=torch.float32, device=x.device)
    engine.lora_project(inner, x, a.contiguous(), scale)
    table = dynamic_map(x.device) if codes is not None else None
    bias = bias if bias is None else bias.to(x.dtype).contiguous()
    tables = levels(quant_type, x.device), absmax, codes, table, offset
    scratch = split_scratch(x, rows)
    engine.quantized_lora_linear(y, x, packed.reshape(-1), *tables, bias, inner, b.contiguous(), *scratch, blocksize)
    return y


def _lora_native(x: Tensor, *args: Any) -> Tensor:
    return (fused_lora if x.is_cuda else quantized_lora_linear_small.reference)(x, *args)


def _lora_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], args[-1])


@raw_op(native=_lora_native, fake=_lora_fake)
def quantized_lora_linear_small(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codes: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    quant_type: str,
    blocksize: int,
    rows: int,
) -> Tensor:
    """quantized_linear_small and scale·(x·Aᵀ)·Bᵀ before the one rounding, A fp32 [r, K], B fp32 [rows, r]."""
    wide = compute_dtype(x)
    dense = bias if bias is None else bias.to(wide)
    y = quantized_linear_small.reference(x.to(wide), packed, absmax, codes, offset, dense, quant_type, blocksize, rows)
    return y.add_(x.to(a.dtype).mm(a.t()).mul_(scale).mm(b.t())).to(x.dtype)


def decodes_in_registers(x: Tensor, blocksize: int) -> bool:
    """True where x has so few rows that its product never writes the weight."""
    return x.numel() <= _small_rows(x, blocksize) * x.shape[-1]


def lora_branch_fits(x: Tensor, blocksize: int) -> bool:
    """True where quantized_lora_linear_small is a kernel: a few rows on a GPU."""
    return x.is_cuda and decodes_in_registers(x, blocksize)


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codes: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    rows: int,
) -> Tensor:
    """x [..., K] · dequant(W)ᵀ + bias -> [..., rows]; no autograd.

    Args:
        x: float32, bfloat16 or float16. packed: uint8, bitsandbytes' layout of W [rows, K].
        absmax, codes, offset: the scales, see :func:`inlay.ops.quantize_blockwise.dequantize_4bit_`.
        bias: [rows] or None.
    """
    check_floating("quantized_linear", "x", x)
    check_device("quantized_linear", "packed", packed, "x", x)
    columns = x.shape[-1]
    check_packed("quantized_linear", packed, absmax, codes, offset, blocksize, rows, columns)
    flat = as_rows(x.detach() if x.requires_grad else x)  # autograd must not keep panels, which are overwritten
    if flat.shape[0] <= _small_rows(flat, blocksize):
        y = quantized_linear_small(flat, packed, absmax, codes, offset, bias, quant_type, blocksize, rows)
        return y.view(*x.shape[:-1], rows)
    height = max(1, _panel_elements(flat) // max(columns, 1))
    panels = []
    for row in range(0, rows, height):
        count = min(height, rows - row)
        panel = workspace(count * columns, flat).view(count, columns)
        dequantize_4bit_(panel, packed, absmax, codes, offset, quant_type, blocksize, columns, row, 0)
        part = None if bias is None else bias[row : row + count].to(x.dtype)
        panels.append(functional.linear(flat, panel, part))
    y = panels[0] if len(panels) == 1 else torch.cat(panels, dim=1)
    return y.view(*x.shape[:-1], rows)


def quantized_linear_backward_input(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codes: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    columns: int,
    onto: Tensor | None = None,
) -> Tensor:
    """dy [..., N] · dequant(W [N, columns]) -> dx [..., columns]; no autograd. `onto`: add to this, contiguous, dx."""
    check_floating("quantized_linear_backward_input", "dy", dy)
    check_device("quantized_linear_backward_input", "packed", packed, "dy", dy)
    rows = dy.shape[-1]
    check_packed("quantized_linear_backward_input", packed, absmax, codes, offset, blocksize, rows, columns)
    flat = as_rows(dy.detach())
    width = max(1, _panel_elements(flat) // max(rows, 1))
    panels = []
    for column in range(0, columns, width):
        count = min(width, columns - column)
        panel = workspace(rows * count, flat).view(rows, count)
        dequantize_4bit_(panel, packed, absmax, codes, offset, quant_type, blocksize, columns, 0, column)
        if onto is not None:
            onto.view(-1, columns)[:, column : column + count].addmm_(flat, panel)
        else:
            panels.append(flat.mm(panel))
    if onto is not None:
        return onto
    dx = panels[0] if len(panels) == 1 else torch.cat(panels, dim=1)
    return dx.view(*dy.shape[:-1], columns)
