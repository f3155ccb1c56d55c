"""Selection by gradient norm on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.linear import is_conv1d
from .activation import run_batches
from .untouched import untouched


def gradient_scores(
    model: nn.Module, sides: Mapping[str, str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """``‖G[:, c]‖₂`` per input channel (side "in") or ``‖G[c, :]‖₂`` per output channel, fp32.

    ``G`` is the loss gradient of the linear's weight summed over ``batches``, which must carry labels. The weights'
    ``requires_grad`` and ``grad`` are as before when this returns.
    """
    linears = {name: model.get_submodule(name) for name in sides}
    with untouched(model, [module.weight for module in linears.values()]):
        run_batches(model, batches, loss=True)
        return {name: _norms(name, module, sides[name]) for name, module in linears.items()}


def _norms(name: str, module: nn.Module, side: str) -> Tensor:
    if module.weight.grad is None:
        raise ValueError(f"calibration gave {name} no gradient; use batches that reach it or exclude it")
    gradient = module.weight.grad.float()
    gradient = gradient.t() if is_conv1d(module) else gradient
    return torch.linalg.vector_norm(gradient, dim=0 if side == "in" else 1)
