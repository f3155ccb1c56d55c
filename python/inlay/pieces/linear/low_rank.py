"""The low-rank delta: ``ΔW = s·B·A``.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.lora_linear import add_low_rank, lora_linear, swiglu_lora_linear
from .base import Delta


class LowRankDelta(Delta):
    """``y = base(x) + s·(dropout(x)·Aᵀ)·Bᵀ`` with A Kaiming-uniform and B zero, both fp32.

    Args:
        weight: the base weight, viewed as ``[out, in]``; only its shape, device and width of dtype are used.
        r: rank. scale: s. dropout: probability with which elements of x are dropped in training.
        generator: where A is drawn from.
    """

    stored = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}  # PEFT keeps each factor in a Linear

    def __init__(
        self, weight: Tensor, r: int, scale: float, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features)
        self.scale, self.dropout = scale, dropout
        dtype = torch.promote_types(weight.dtype, torch.float32)
        bound = 1 / math.sqrt(in_features)  # Kaiming-uniform with a = sqrt(5), as torch initializes a Linear
        drawn = torch.rand(r, in_features, generator=generator) * (2 * bound) - bound
        self.lora_A = nn.Parameter(drawn.to(weight.device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, dtype=dtype, device=weight.device))

    def _dropped(self, x: Tensor) -> Tensor | None:
        return nn.functional.dropout(x, self.dropout) if self.training and self.dropout > 0 else None

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        dropped = self._dropped(x)
        return add_low_rank(y, x if dropped is None else dropped, self.lora_A, self.lora_B, self.scale)

    def linear(self, x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
        return lora_linear(x, self.lora_A, self.lora_B, self.scale, base, *tensors, dropped=self._dropped(x))

    def gated_linear(self, gate: Tensor, up: Tensor, act: str, base: Any, *tensors: Tensor | None) -> Tensor:
        if self.training and self.dropout > 0:  # dropout makes another tensor of the product; nothing to rebuild
            return super().gated_linear(gate, up, act, base, *tensors)
        return swiglu_lora_linear(gate, up, act, self.lora_A, self.lora_B, self.scale, base, *tensors)

    def weight_delta(self) -> Tensor:
        return self.scale * (self.lora_B @ self.lora_A)

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Delta]], where: str) -> Delta:
        """The factors side by side: ``[s₁w₁B₁ s₂w₂B₂]·[A₁; A₂]``, of scale 1."""
        deltas: list[Any] = [delta for _, delta in parts]
        like = deltas[0].lora_A.new_empty(1).expand(deltas[0].out_features, deltas[0].in_features)
        made = cls(like, sum(delta.lora_A.shape[0] for delta in deltas), 1.0, generator=torch.Generator())
        with torch.no_grad():
            made.lora_A.copy_(torch.cat([delta.lora_A for delta in deltas]))
            made.lora_B.copy_(torch.cat([weight * delta.scale * delta.lora_B for weight, delta in parts], dim=1))
        return made

    def structure(self) -> Any:
        return self.scale

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_A.shape[0]

    def pad(self, r: int) -> None:
        """Grow to rank ``r`` with zeros, which changes nothing."""
        missing = r - self.lora_A.shape[0]
        self.lora_A = nn.Parameter(nn.functional.pad(self.lora_A.detach(), (0, 0, 0, missing)))
        self.lora_B = nn.Parameter(nn.functional.pad(self.lora_B.detach(), (0, missing)))

    def changes_anything(self) -> bool:
        return bool(self.lora_B.detach().any())

    def lora_factors(self, weight: Callable[[], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """``s`` is folded into B, so that the product needs no scaling."""
        return self.lora_A.detach().clone(), self.scale * self.lora_B.detach()

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"
