"""BitFit: only biases train.

Source: Ben Zaken, Ravfogel, Goldberg, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", ACL 2022, arXiv:2106.10199. All bias terms, those of norms included, and the task's head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from .base import Calibration, register
from .whole import TrainsWhole


@register
@dataclass
class BitFit(TrainsWhole):
    """Train the biases of linears and norms, in fp32, also those of quantized linears; no linear's input is kept."""

    peft_type: ClassVar[str] = "BITFIT"

    rounding: str = field(default="fp32", kw_only=True)

    def keys(self, model: nn.Module, calibration: Calibration | None) -> list[str]:
        keys = [key for key in self.candidates(model) if key.rpartition(".")[2] == "bias"]
        if not keys:
            raise ValueError(
                f"BitFit: this {type(model).__name__} has no bias to train there; use inlay.LNTuning (norms), "
                "inlay.SSF (scales of every output) or a delta such as inlay.LoRA"
            )
        return keys
