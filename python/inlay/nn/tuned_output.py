"""Pieces on modules that are no linears: norms, embeddings. The module keeps its place, class and parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .holder import Holder, inputs_of
from .mixed import Mixed, mix, unmix


class TunedOutput(Holder, Mixed):
    """Mixin of a module of one input whose output, or input, pieces change."""

    def forward(self, x: Any) -> Any:
        active = self.active_deltas()
        changed, inputs = inputs_of(active, x)
        y = super().forward(changed)
        for piece, given in zip(active, inputs, strict=True):
            y = piece.after(y, given)
        return y

    @torch.no_grad()
    def settle(self) -> None:
        """Put the active pieces into the module's own weight and bias, and hold none any more."""
        weight, bias = self.weight, getattr(self, "bias", None)
        for piece in self.active_deltas():
            weight, bias = piece.merge(weight, bias)
        for name, merged in (("weight", weight), ("bias", bias)):
            if merged is not None and merged is not self._parameters.get(name):
                self._parameters[name] = nn.Parameter(merged.contiguous(), requires_grad=False)
        release(self)


def hold_outputs(module: nn.Module) -> TunedOutput:
    """Make ``module`` a holder of pieces, in place."""
    held: Any = module
    if not isinstance(module, TunedOutput):
        mix(module, TunedOutput)
        held.start_holding()
    return held


def release(module: nn.Module) -> None:
    """Undo :func:`hold_outputs`."""
    del module.deltas, module.active
    while isinstance(module, TunedOutput):  # it may stand behind a mixin that was put on later
        unmix(module)
