"""Modules of experts: fused, and holding pieces. Both keep their place, class and parameters.

A token's rows are sorted by expert once for both products; nothing is kept for backward but the tokens, gate and up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..sharding import is_sharded
from .expert_layout import ExpertsLayout, compute_experts, experts_settings, layout_of
from .mixed import Mixed, mix
from .tuned_output import TunedOutput, release

__all__ = ["FusedExperts", "TunedExperts", "experts_settings", "hold_experts"]


def _inputs(layout: ExpertsLayout, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any, Any] | None:
    """Tokens, experts and weights of a call; None where it is none that was proven."""
    names = layout.arguments[len(args) :]
    if set(names) != set(kwargs):
        return None
    given = (*args, *(kwargs[name] for name in names), None, None)
    x = given[0]
    fits = isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point()
    return (x, given[1], given[2]) if fits else None


class FusedExperts(Mixed):
    """Mixin of a module of experts that computes ``Σ_k w·down(act(gate)·up)`` of each token's own."""

    inlay_experts: ExpertsLayout

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs = _inputs(self.inlay_experts, args, kwargs)
        if inputs is None or not self._is_ours(inputs[0]):
            return super().forward(*args, **kwargs)
        return compute_experts(self, self.inlay_experts, *inputs)

    def _is_ours(self, x: Tensor) -> bool:
        """Not on a GPU, where transformers has a grouped product ("meta" is what estimates run on); nor with experts of
        other processes."""
        here = x.device.type in ("cpu", "meta") and not getattr(self, "_is_expert_parallel", False)
        return here and not is_sharded(getattr(self, self.inlay_experts.up))


class TunedExperts(TunedOutput):
    """Mixin of a module of experts that holds pieces on its stacks."""

    inlay_experts: ExpertsLayout

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        active = self.active_deltas()
        if not active:
            return super(TunedOutput, self).forward(*args, **kwargs)
        inputs = _inputs(self.inlay_experts, args, kwargs)
        if inputs is None:
            wanted = ", ".join(self.inlay_experts.arguments)
            raise ValueError(f"{type(self).__name__}: wanted ({wanted}) with tokens [T, H], as transformers calls it")
        terms = [tuple(t for piece in active for t in piece.terms(name)) for name in self._stacks()]
        return compute_experts(self, self.inlay_experts, *inputs, *terms)

    def _stacks(self) -> tuple[str, str]:
        return self.inlay_experts.up, self.inlay_experts.down

    @torch.no_grad()
    def settle(self) -> None:
        for name in self._stacks():
            merged = held = self._parameters[name]
            for piece in self.active_deltas():
                merged = piece.merge_stack(name, merged)
            if merged is not held:
                self._parameters[name] = nn.Parameter(merged, requires_grad=False)
        release(self)


def hold_experts(module: nn.Module, where: str) -> TunedExperts:
    """Make ``module`` a holder of pieces, in place; ValueError if what it computes is not proven."""
    held: Any = module
    if not isinstance(module, TunedExperts):
        layout = proven_layout(module, where)
        mix(module, TunedExperts)
        held.inlay_experts = layout
        held.start_holding()
    return held


def proven_layout(module: nn.Module, where: str) -> ExpertsLayout:
    """The layout of a module of experts; ValueError if what it computes is not proven."""
    layout = layout_of(module)
    if layout is None:
        raise ValueError(
            f"{where}: wanted a module of experts whose forward is understood, got a {type(module).__name__} that "
            "computes something else; leave it out of target_parameters"
        )
    return layout
