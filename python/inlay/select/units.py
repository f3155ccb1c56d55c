"""How much each output unit of a linear matters for the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .activation import run_batches
from .untouched import untouched


def unit_importance(model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """``|∂L/∂m|`` of a mask m = 1 on each output channel of each named linear, summed over ``batches``: fp32 ``[out]``.

    The gradient of a mask is ``Σ dy·y`` over tokens; nothing of the size of a weight is formed.

    Raises:
        ValueError: there is no batch, or it carries no labels, or never reaches one of the linears.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_(True)
        value = output.detach()

        def add(dy: Tensor) -> None:
            products = (dy.float() * value.float()).reshape(-1, value.shape[-1]).sum(0)
            sums[name] = sums.get(name, torch.zeros_like(products)) + products

        output.register_hook(add)
        return output

    with untouched(model), ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(lambda m, a, y, name=name: watch(name, y)).remove)
        run_batches(model, batches, loss=True)
    missing = [name for name in names if name not in sums]
    if missing:
        raise ValueError(f"calibration never reached {missing[:3]}; use batches that do or exclude these modules")
    return {name: sums[name].abs() for name in names}
