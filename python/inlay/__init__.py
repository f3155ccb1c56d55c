"""inlay fine-tunes a small dense piece set into a frozen model, and computes only what that piece needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import optim
from .adapters import Verification, export, merge, verify
from .bases import BaseConfig
from .budget import Budget
from .estimate import Estimate, estimate
from .methods import BY_CLASS as _METHODS
from .methods.lora import LoRA
from .methods.s2ft import S2FT
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
    "Budget",
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
#: Every method is a public name; a new one is there by its file in methods/.
globals().update(_METHODS)
__all__ += [name for name in _METHODS if name not in __all__]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name], __name__), name)
