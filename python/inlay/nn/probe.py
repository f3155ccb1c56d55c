"""Proof by probing: a fused block is used only where it computes what the module it stands for computes.

A module is found by its structure (what children and attributes it has), then run against the fused version on random
fp32 weights and inputs. No list of model classes is kept, and a new family is fused or left alone on its own merits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

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


def same(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> bool:
    """True if both run and give the same values; a module that cannot be run this way is not what it looked like."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            a, b = first(), second()
        except Exception:
            return False  # the structure misled us; the module stays as it is
    return a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE * a.abs().max())


def generator() -> torch.Generator:
    """Random numbers of the probe's own: tuning must not disturb the user's seed."""
    return torch.Generator().manual_seed(20260101)
