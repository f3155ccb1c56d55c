"""Methods: one config dataclass each, composing a selector, a delta and a schedule. One file each."""

from __future__ import annotations

from .base import Calibration, Method
from .lora import LoRA
from .s2ft import S2FT

#: Methods by the name an adapter file stores.
METHODS: dict[str, type[Method]] = {cls.peft_type: cls for cls in (S2FT, LoRA)}

__all__ = ["METHODS", "S2FT", "LoRA", "Calibration", "Method"]
