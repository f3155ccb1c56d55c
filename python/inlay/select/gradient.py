"""Selection by gradient norm on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.linear import is_conv1d
from .activation import run_batches


def gradient_scores(
    model: nn.Module, sides: Mapping[str, str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """``‖G[:, c]‖₂`` per input channel (side "in") or ``‖G[c, :]‖₂`` per output channel, fp32.

    ``G`` is the loss gradient of the linear's weight summed over ``batches``, which must carry labels. The weights'
    ``requires_grad`` and ``grad`` are as before when this returns.
    """
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    linears = {name: model.get_submodule(name) for name in sides}
    wanted = {module.weight for module in linears.values()}
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in wanted)
            parameter.grad = None
        run_batches(model, batches, loss=True)
        return {name: _norms(name, module, sides[name]) for name, module in linears.items()}
    finally:
        for parameter, (requires_grad, grad) in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _norms(name: str, module: nn.Module, side: str) -> Tensor:
    if module.weight.grad is None:
        raise ValueError(f"calibration gave {name} no gradient; use batches that reach it or exclude it")
    gradient = module.weight.grad.float()
    gradient = gradient.t() if is_conv1d(module) else gradient
    return torch.linalg.vector_norm(gradient, dim=0 if side == "in" else 1)
