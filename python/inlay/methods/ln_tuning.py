"""LN tuning: only norms train.

Source: Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", ICLR 2024,
arXiv:2312.11420; all norms of the model, as PEFT's LNTuning has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from ..sites import is_norm
from .base import Calibration, register
from .whole import TrainsWhole


@register
@dataclass
class LNTuning(TrainsWhole):
    """Train weights and biases of the norms, in fp32."""

    peft_type: ClassVar[str] = "LN_TUNING"

    rounding: str = field(default="fp32", kw_only=True)

    def keys(self, model: nn.Module, calibration: Calibration | None) -> list[str]:
        return [key for key in self.candidates(model) if is_norm(model.get_submodule(key.rpartition(".")[0]))]
