"""Proof by probing: a fused block is used only where it computes what the module it stands for computes.

A module is found by its structure (what children and attributes it has), then run against the fused version on random
fp32 weights and inputs. No list of model classes is kept, and a new family is fused or left alone on its own merits.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn

#: fp32, relative to the largest output: a few roundings in another order; semantics differ by far more.
_TOLERANCE = 2e-5


def shallow(module: nn.Module, children: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``module`` that shares everything but these children and parameters; the original is not touched."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {**module._modules, **children}
    twin.__dict__["_parameters"] = {**module._parameters, **{k: nn.Parameter(v) for k, v in weights.items()}}
    return twin


#: Sizes of inputs to try: a clamp shows above it, an eps below it.
MAGNITUDES = (1e-3, 1.0, 30.0, 1e4)


def same(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> bool:
    """True if both run and give the same values; a module that cannot be run this way is not what it looked like."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            a, b = first(), second()
        except Exception:
            return False  # the structure misled us; the module stays as it is
    return close(a, b)


def close(a: Tensor, b: Tensor) -> bool:
    """Same shape, finite at the same places, and there the same but for roundings."""
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = a.nan_to_num(0.0, 0.0, 0.0), b.nan_to_num(0.0, 0.0, 0.0)
    return bool((a - b).abs().max() <= _TOLERANCE * a.abs().max()) if a.numel() else True


def same_at_all_sizes(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """:func:`same` for ``x``, whose elements are about 1, at every magnitude, and for zero."""
    inputs = [x * size for size in MAGNITUDES] + [torch.zeros_like(x)]
    return all(same(partial(first, each), partial(second, each)) for each in inputs)


def takes_only(module: nn.Module, names: Collection[str]) -> bool:
    """True if ``module.forward`` takes one input, under any name, and no other argument than ``names``.

    An argument that the fused block does not know (a gate, an index of experts) would be lost or crash it.
    """
    if "forward" in module.__dict__:
        return False  # somebody has put another one in place of the class's
    _, first, *others = inspect.signature(type(module).forward).parameters.values()
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        return False
    return all(other.name in names or (other.kind is other.VAR_KEYWORD and "kwargs" in names) for other in others)


def generator() -> torch.Generator:
    """Random numbers of the probe's own: tuning must not disturb the user's seed."""
    return torch.Generator().manual_seed(20260101)
