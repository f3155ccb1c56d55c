"""What the tests of kernels share: one op at one place against its reference, and packed weights."""

from __future__ import annotations

import math

import torch
from _compare import assert_as_good
from torch import Tensor
from torch.utils._pytree import tree_map_only

from inlay.ops._registry import RAW_OPS
from inlay.ops.quantize_blockwise import dequantize_absmax, levels, quantize_absmax


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


def packed_weight(out, width, blocksize, quant_type="nf4", nested=False):
    """Storage of a random weight and the scales it stands for."""
    packed, absmax = RAW_OPS["quantize_4bit"].reference(weight(out, width) / width**0.5, quant_type, blocksize)
    if not nested:
        return (packed, absmax, None, None), absmax
    codes, absmax, offset = quantize_absmax(absmax)
    return (packed, absmax, codes, offset), dequantize_absmax(codes, absmax, offset)


# What the tensor cores multiply are levels rounded to 16 bits: 1.3e-3 in bf16 on top of the output's 1.66e-3.
GATES = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-6}


def stands_for(storage, scales, blocksize, quant_type, out, width):
    """A packed weight in float64."""
    nibbles = torch.stack((storage[0] >> 4, storage[0] & 15), dim=1).view(-1)[: out * width].long()
    exact = levels(quant_type).double()[nibbles] * scales.double().repeat_interleave(blocksize)[: out * width]
    return exact.view(out, width)


def assert_within_gate(y, wanted, rounded=None):
    """``rounded``: the product with weights rounded to y's dtype, as tiles of a CPU take them: by how much that is off
    depends on the weights, which share the rounding of a block's scale."""
    if wanted.numel():
        gate = GATES[y.dtype]
        if rounded is not None:
            gate = max(gate, 1.2 * math.hypot(float((rounded - wanted).norm() / wanted.norm()), 1.66e-3))
        gate *= 1 if y.numel() >= 1000 else 2  # a few numbers may all round the same way
        error = float((y.double() - wanted).norm() / wanted.norm())
        assert error <= gate, f"{y.shape[0]} rows: relative error {error:.2e}, allowed {gate:.1e}"
