"""Fused blocks: RMS norms and gated MLPs that keep for backward only what cannot be rebuilt.

RMSNorm    keeps x and rstd [M]             instead of two fp32 copies of x
gated MLP  keeps gate and up                instead of gate, act(gate), up and their product
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.rms_norm import rms_norm
from ..ops.swiglu import swiglu
from .attention import FusedAttention, attention_settings
from .delta_rule import FusedDeltaRule, delta_rule_settings
from .experts import FusedExperts, experts_settings
from .mixed import Mixed, mix
from .probe import (
    MAGNITUDES,
    generator,
    same_at_all_sizes,
    settings_in_both_modes,
    shallow,
    signature_of,
    takes_only,
)
from .stack import linears_of


class FusedRMSNorm(Mixed):
    """Mixin of a norm that computes ``x / rms(x) * (offset + weight)``."""

    inlay_eps: float
    inlay_offset: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.inlay_eps, self.inlay_offset)


class FusedGatedRMSNorm(Mixed):
    """Mixin of a norm that computes ``x / rms(x) * weight * act(gate)``, of linear attention's outputs."""

    inlay_eps: float
    inlay_act: str

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None, **kwargs: Any) -> Tensor:
        if gate is None or kwargs or gate.dtype != hidden_states.dtype:
            return super().forward(hidden_states, gate, **kwargs)
        return swiglu(gate, rms_norm(hidden_states, self.weight, self.inlay_eps), self.inlay_act)


class FusedGatedMLP(Mixed):
    """Mixin of an MLP that computes ``down(act(gate(x)) * up(x))``."""

    inlay_same_input = ("gate_proj", "up_proj")
    inlay_act: str

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linears_of(x, [getattr(self, name) for name in self.inlay_same_input])
        # TunedLinear, and the layers that integrations put on a linear
        if hasattr(type(self.down_proj), "forward_gated") and not self.down_proj.watched:
            return self.down_proj.forward_gated(gate, up, self.inlay_act)
        return self.down_proj(swiglu(gate, up, self.inlay_act))


def _own_weight_and_eps(module: nn.Module) -> tuple[Tensor, float] | None:
    """Of what has one weight per channel, an epsilon, and nothing else that it computes with."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if set(module._parameters) != {"weight"} or module._modules or getattr(module, "bias", None) is not None:
        return None
    return weight, eps


def norm_settings(module: nn.Module) -> dict[str, float] | None:
    """``inlay_eps`` and ``inlay_offset`` of an RMS norm, or None if ``module`` is none."""
    found = _own_weight_and_eps(module)
    if found is None or not takes_only(module, ()):
        return None
    (weight, eps), random = found, generator()
    width = weight.shape[0]
    twin = shallow(module, {}, {"weight": torch.randn(width, generator=random)})
    x = torch.randn(3, width, generator=random)
    for offset in (0.0, 1.0):
        ours = partial(_normed, twin.weight, eps, offset)
        if same_at_all_sizes(twin, ours, x):
            return {"inlay_eps": eps, "inlay_offset": offset}
    return None


def _normed(weight: Tensor, eps: float, offset: float, x: Tensor) -> Tensor:
    return rms_norm(x, weight, eps, offset)


def gated_norm_settings(module: nn.Module) -> dict[str, Any] | None:
    """``inlay_eps`` and ``inlay_act`` of an RMS norm whose output is gated, or None if ``module`` is none."""
    found = _own_weight_and_eps(module)
    if found is None or "gate" not in inspect.signature(type(module).forward).parameters:
        return None
    if not takes_only(module, ("gate", "kwargs")):
        return None
    (weight, eps), random = found, generator()
    x, gate = (torch.randn(3, weight.shape[0], generator=random) for _ in range(2))
    twin = shallow(module, {}, {"weight": torch.randn(weight.shape[0], generator=random)})
    for act in ("silu", "gelu_tanh", "gelu"):
        ours = partial(_normed_and_gated, twin.weight, eps, act)
        if all(
            same_at_all_sizes(partial(twin, gate=gate * size), partial(ours, gate * size), x) for size in MAGNITUDES
        ):
            return {"inlay_eps": eps, "inlay_act": act}
    return None


def _normed_and_gated(weight: Tensor, eps: float, act: str, gate: Tensor, x: Tensor) -> Tensor:
    return swiglu(gate, rms_norm(x, weight, eps), act)


def mlp_settings(module: nn.Module) -> dict[str, str] | None:
    """``inlay_act`` of a gated MLP, or None if ``module`` is none."""
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")):
        return None
    if not takes_only(module, ()):
        return None
    random, small = generator(), {}
    for name, (rows, columns) in {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}.items():
        small[name] = nn.Linear(columns, rows)
        small[name].weight.data = torch.randn(rows, columns, generator=random)
        small[name].bias.data = torch.randn(rows, generator=random)
    twin = shallow(module, small, {})
    x = torch.randn(5, 8, generator=random)
    for act in ("silu", "gelu_tanh", "gelu"):
        if same_at_all_sizes(twin, partial(_gated, twin, act), x):
            return {"inlay_act": act}
    return None


def _gated(module: nn.Module, act: str, x: Tensor) -> Tensor:
    return module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x), act))


#: Each mixin with what proves that a module may have it.
FUSIONS: tuple[tuple[type, Callable[[nn.Module], dict | None]], ...] = (
    (FusedRMSNorm, norm_settings),
    (FusedGatedRMSNorm, gated_norm_settings),
    (FusedGatedMLP, mlp_settings),
    (FusedAttention, attention_settings),
    (FusedDeltaRule, delta_rule_settings),
    (FusedExperts, experts_settings),
)


def install_blocks(model: nn.Module) -> dict[str, int]:
    """Fuse every module of ``model`` that is proven to compute what a fused block computes; how many of each."""
    proven: dict[tuple, dict | None] = {}
    counts: dict[str, int] = {}
    for module in list(model.modules()):
        if isinstance(module, Mixed):
            continue
        for mixin, settings_of in FUSIONS:
            key = (mixin, type(module), signature_of(module))
            if key not in proven:
                proven[key] = settings_in_both_modes(module, settings_of)
            settings = proven[key]
            if settings is not None:
                mix(module, mixin)
                for name, value in settings.items():
                    setattr(module, name, value)
                counts[mixin.__name__] = counts.get(mixin.__name__, 0) + 1
                break
    return counts
