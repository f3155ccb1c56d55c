"""How much the loss would gain from gates on the inputs of linears: their gradient where they are still open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..roles import widths
from .activation import run_batches
from .untouched import untouched


def gate_gradients(model: nn.Module, names: Sequence[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """``∂loss/∂A [in]`` at A = 0 of ``linear((1 + A)·x)``, of the loss summed over ``batches``, which must have labels.

    Works on any base: no weight's gradient is formed. The parameters' ``requires_grad`` is as before.
    """
    device = next(model.parameters()).device
    gates = {n: torch.zeros(widths(model.get_submodule(n))[0], device=device, requires_grad=True) for n in names}
    with untouched(model), ExitStack() as stack:
        for name, gate in gates.items():
            handle = model.get_submodule(name).register_forward_pre_hook(partial(_gated, gate))
            stack.callback(handle.remove)
        run_batches(model, batches, loss=True)
    found = {}
    for name, gate in gates.items():
        if gate.grad is None:
            raise ValueError(f"calibration gave {name} no gradient; use batches that reach it or exclude it")
        found[name] = gate.grad
    return found


def _gated(gate: Tensor, module: nn.Module, args: tuple) -> tuple:
    return (args[0] * (1 + gate).to(args[0].dtype), *args[1:])
