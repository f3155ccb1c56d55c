"""The same work by bitsandbytes and Unsloth, where they can be imported: calls to time, or why there are none.

Called as their own Python does it, not captured in a graph: both launch on streams of their choice, which a capture
refuses. Ours is timed the same way beside them (`called` in ops.py).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Calls = list[Callable[[], Any]]


@functools.cache
def library(name: str) -> Any:
    """The module, or None; a library that fails while it is imported is as good as none, and says so once."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        print(f"{name}: not compared: {type(error).__name__}: {str(error)[:200]}")
        return None


def packed_by_bitsandbytes(dense: Tensor) -> tuple[Tensor, Any]:
    functional = library("bitsandbytes.functional")
    return functional.quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")


def dequantize(dense: list[Tensor]) -> dict[str, Calls]:
    """One doubly quantized NF4 weight [out, in] to its dtype."""
    functional = library("bitsandbytes.functional")
    if functional is None:
        return {}
    packed = [packed_by_bitsandbytes(w) for w in dense]
    out = torch.empty_like(dense[0]) if dense[0].is_cuda else None  # on a CPU it takes none
    peers: dict[str, Calls] = {
        "bitsandbytes": [lambda p=p, s=s: functional.dequantize_4bit(p, quant_state=s, out=out) for p, s in packed]
    }
    unsloth = library("unsloth.kernels.utils") if dense[0].is_cuda else None
    if unsloth is not None:
        peers["Unsloth"] = [lambda p=p, s=s: unsloth.fast_dequantize(p, s, out=out) for p, s in packed]
    return peers


def linear(dense: list[Tensor], x: Tensor) -> dict[str, Calls]:
    """x [M, in] times the transpose of such a weight."""
    bitsandbytes = library("bitsandbytes")
    if bitsandbytes is None:
        return {}
    packed = [packed_by_bitsandbytes(w) for w in dense]
    return {"bitsandbytes": [lambda p=p, s=s: bitsandbytes.matmul_4bit(x, p.t(), quant_state=s) for p, s in packed]}


def swiglu(gate: list[Tensor], up: list[Tensor]) -> dict[str, Calls]:
    """silu(gate)·up of [M, inner]."""
    unsloth = library("unsloth.kernels.swiglu") if gate[0].is_cuda else None
    if unsloth is None:
        return {}
    return {"Unsloth": [lambda g=g[None], u=u[None]: unsloth.swiglu_fg_kernel(g, u) for g, u in zip(gate, up)]}
