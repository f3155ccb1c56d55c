"""Methods: one config dataclass each, which plans pieces on sites. One file each."""

from __future__ import annotations

import importlib
import pkgutil

from .base import METHODS, Calibration, Method, Plan, register, stored_keys

for _module in pkgutil.iter_modules(__path__):  # a method is there by being a file here
    importlib.import_module(f"{__name__}.{_module.name}")

#: The methods by the name of their class, which users type.
BY_CLASS = {cls.__name__: cls for cls in METHODS.values()}
globals().update(BY_CLASS)

__all__ = ["BY_CLASS", "METHODS", "Calibration", "Method", "Plan", "register", "stored_keys", *BY_CLASS]
