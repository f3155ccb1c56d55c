"""inlay fine-tunes a small dense piece set into a frozen model, and computes only what that piece needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import optim
from .adapters import Verification, export, merge, verify
from .bases import BaseConfig
from .estimate import Estimate, estimate
from .methods import S2FT, LoRA
from .state import disabled
from .tune import load, tune
from .version import __version__

if TYPE_CHECKING:
    from .integrations.quantizer import QuantizationConfig, from_pretrained
    from .train import finetune

#: Names that need transformers, which is imported when one of them is first asked for.
_LAZY = {
    "QuantizationConfig": ".integrations.quantizer",
    "finetune": ".train",
    "from_pretrained": ".integrations.quantizer",
}

__all__ = [
    "S2FT",
    "BaseConfig",
    "Estimate",
    "LoRA",
    "QuantizationConfig",
    "Verification",
    "__version__",
    "disabled",
    "estimate",
    "export",
    "finetune",
    "from_pretrained",
    "load",
    "merge",
    "optim",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name], __name__), name)
