"""``compute="int8"``: the frozen products of a model's blocks in 8 bits (ops/int8_products.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _native
from ..bases import BaseConfig, QuantizedWeight
from ..bases.linear import base_linear, base_of, in_int8
from ..ops.matmul_sum import ISA
from .mixed import Mixed, mix
from .tuned_linear import TunedLinear

#: Rows and columns from which a weight is multiplied in 8 bits: gates and routers decide by small differences.
LEAST = 32


class Int8Linear(Mixed):
    """Mixin of a frozen linear without pieces: ``x·Wᵀ + b`` in 8 bits, for many rows."""

    inlay_int8 = True  # see bases.linear.base_of

    def forward(self, x: Tensor) -> Tensor:
        return base_linear(x, base_of(self), self.weight, self.bias)


def check_int8(model: nn.Module) -> None:
    """Raise ValueError unless this machine and ``model`` can compute in 8 bits; nothing has changed then."""
    isa = _native.module().isa() if _native.available() else "no native engine"
    if isa != ISA:
        raise ValueError(
            f'compute="int8": wanted a CPU that multiplies bytes and pairs of bf16 ({ISA}), got {isa}; '
            "leave compute out"
        )
    if any(isinstance(module, QuantizedWeight) for module in model.modules()):
        raise ValueError('compute="int8": wanted dense weights, got packed ones; leave base out, or compute')
    first = next(model.parameters())
    if first.dtype != torch.bfloat16 or not first.is_cpu:
        raise ValueError(
            f'compute="int8": wanted a bfloat16 model on the CPU, got {first.dtype} on {first.device}; load it with '
            "dtype=torch.bfloat16"
        )


def compute_in_int8(model: nn.Module) -> int:
    """Let the linears that ``base="int8"`` would quantize multiply in 8 bits; how many. Undone with all mixins.

    Raises:
        ValueError: see :func:`check_int8`.
    """
    check_int8(model)
    count = 0
    for name in BaseConfig("int8").names(model):
        module: Any = model.get_submodule(name)
        if min(module.weight.shape) < LEAST or "inlay_whole" in module.__dict__:
            continue
        if isinstance(module, TunedLinear):
            module.base = in_int8(module.base)
        elif not isinstance(module, Int8Linear):
            mix(module, Int8Linear)
        count += 1
    return count
