"""Selection by gradient norm on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.linear import is_conv1d
from .activation import run_batches
from .untouched import one_at_a_time


def gradient_scores(
    model: nn.Module, sides: Mapping[str, str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """``Σ ‖G[:, c]‖₂`` per input channel (side "in") or ``Σ ‖G[c, :]‖₂`` per output channel over ``batches``, fp32.

    ``G`` is the gradient of a batch's loss by the linear's weight; batches must carry labels. One weight's gradient
    exists at a time: it becomes the norms of its channels as soon as the backward has formed it. The weights'
    ``requires_grad`` and ``grad`` are as before when this returns.

    Raises:
        ValueError: there is no batch, or it carries no labels, or never reaches one of the linears.
    """
    scores: dict[str, Tensor] = {}
    linears = {name: model.get_submodule(name) for name in sides}

    def add(name: str, gradient: Tensor) -> None:
        norms = _norms(gradient.t() if is_conv1d(linears[name]) else gradient, sides[name])
        scores[name] = scores[name] + norms if name in scores else norms

    with one_at_a_time(model, {name: module.weight for name, module in linears.items()}, add):
        run_batches(model, batches, loss=True)
    for name in sides:
        if name not in scores:
            raise ValueError(f"calibration gave {name} no gradient; use batches that reach it or exclude it")
    return {name: scores[name] for name in sides}


def _norms(gradient: Tensor, side: str) -> Tensor:
    """The norm of each channel of ``gradient [out, in]``, squared and summed in fp32."""
    return torch.linalg.vector_norm(gradient, dim=0 if side == "in" else 1, dtype=torch.float32)
