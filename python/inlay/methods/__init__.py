"""Methods: one config dataclass each, which plans pieces on sites. One file each."""

from __future__ import annotations

from .base import METHODS, Calibration, Method, Plan, register, stored_keys
from .lora import LoRA
from .s2ft import S2FT

__all__ = ["METHODS", "S2FT", "Calibration", "LoRA", "Method", "Plan", "register", "stored_keys"]
