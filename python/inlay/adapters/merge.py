"""Merge: from a tuned model back to plain modules, with the adapter in the weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..model import make_plain, require_state, tuned_linears


@torch.no_grad()
def merge(model: nn.Module, *, in_place: bool = False) -> nn.Module:
    """A plain model whose weights contain the active adapters: original classes, dtype and channel order.

    ``W[:, I] = round(float(W[:, I]) + V)``: one rounding, into the weight's own dtype.

    Args:
        in_place: turn ``model`` itself into the plain model instead of a copy, which needs no second set of weights.

    Raises:
        TypeError: the model is not tuned.
    """
    require_state(model, "merge")
    plain = model if in_place else copy.deepcopy(model)
    for name, module in tuned_linears(plain).items():
        parent, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, module.to_plain())
    return make_plain(plain)
