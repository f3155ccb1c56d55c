"""Full fine-tuning: every weight trains. What the other methods are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .base import Calibration, register
from .whole import TrainsWhole


@register
@dataclass
class Full(TrainsWhole):
    """Train every parameter of the model, embeddings and head included, or those that ``target_modules`` names."""

    peft_type: ClassVar[str] = "FULL"

    def keys(self, model: nn.Module, calibration: Calibration | None) -> list[str]:
        return self.candidates(model)
