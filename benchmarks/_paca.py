"""PaCA in plain torch: random input columns of a weight train inside it, and only they get a weight gradient.

Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025, arXiv:2503.01905: what trains
lies in the pretrained weight, so that the forward is one product, and the backward keeps the chosen inputs alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _PartialLinear(torch.autograd.Function):
    """``x·Wᵀ (+ b)``; gradients of x and of the columns of W that ``columns`` names."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(x[..., columns], weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        chosen, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, None, dy.flatten(0, -2).t() @ chosen.flatten(0, -2), None


class PartialLinear(nn.Module):
    """A frozen linear of which the input columns ``columns [r]`` train, in the weight's dtype."""

    def __init__(self, linear: nn.Linear, columns: Tensor) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.register_buffer("columns", columns)
        self.values = nn.Parameter(linear.weight.detach()[:, columns].clone())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight[:, self.columns] = self.values
        return _PartialLinear.apply(x, self.linear.weight, self.linear.bias, self.values, self.columns)


def install(model: nn.Module, channels: dict[str, int], seed: int = 0) -> None:
    """Freeze ``model`` and let as many random columns of each named linear train as ``channels`` says."""
    model.requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for name, count in channels.items():
        linear = model.get_submodule(name)
        columns = torch.randperm(linear.in_features, generator=random)[:count].sort().values
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, PartialLinear(linear, columns.to(linear.weight.device)))


def channels_of_s2ft(model: nn.Module, ratio: float = 0.03) -> dict[str, int]:
    """How many channels of each linear S2FT trains at ``ratio``: what a fair PaCA has, too."""
    import inlay

    plan = inlay.S2FT(ratio=ratio).plan(model, None)
    built = {site.path: build(model.get_submodule(site.path)) for site, build in plan.pieces.items()}
    return {name: piece.s2ft_indices.numel() for name, piece in built.items()}
