"""Linears that read the same input, computed together where that is the same and cheaper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..bases.linear import base_of
from ..bases.quantized import QuantizedLinear
from ..ops.base_products import DenseBase
from ..ops.stacked_linear import Part, stacked_linear
from ..pieces.linear import LowRankDelta
from .int8 import Int8Linear
from .tuned_linear import TunedLinear, is_watched


def linears_of(x: Tensor, modules: Sequence[nn.Module], apart: bool = False) -> Sequence[Tensor]:
    """``[module(x) for module in modules]``: query, key and value projections, or gate and up.

    apart: each output in memory of its own, where they are not needed equally long.

    One autograd node for those that are frozen linears with at most one low-rank delta and that nothing watches, where
    gradients are wanted; then the gradients of ``x`` are summed inside its products. The others are called one by one.
    """
    if not torch.is_grad_enabled():
        return [module(x) for module in modules]
    parts: dict[int, Part] = {}
    for place, module in enumerate(modules):
        part = part_of(module)
        if part is not None:
            parts[place] = part
    if len(parts) < 2 or not (x.requires_grad or any(part.a is not None for part in parts.values())):
        return [module(x) for module in modules]
    together = dict(zip(parts, stacked_linear(x, list(parts.values()), apart), strict=True))
    return [together[place] if place in together else module(x) for place, module in enumerate(modules)]


def part_of(module: nn.Module) -> Part | None:
    """What ``module(x)`` computes as a part of a stack, or None if it is anything else."""
    if is_watched(module):
        return None
    if isinstance(module, TunedLinear):
        active = module.active_deltas()
        if not module.deltas:
            return Part(module.base, module.base_tensors)
        delta = active[0] if len(active) == len(module.deltas) == 1 else None
        if not isinstance(delta, LowRankDelta) or (delta.training and delta.dropout > 0):
            return None
        return Part(module.base, module.base_tensors, delta.lora_A, delta.lora_B, delta.scale)
    if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return None
    if type(module) is QuantizedLinear:
        return Part(module.storage, module.tensors)
    if isinstance(module, Int8Linear):
        return Part(base_of(module), (module.weight, module.bias))
    return Part(DenseBase, (module.weight, module.bias)) if type(module) is nn.Linear else None
