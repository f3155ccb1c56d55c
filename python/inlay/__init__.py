"""inlay fine-tunes a small dense piece set into a frozen model, and computes only what that piece needs."""

from . import optim
from .adapters import Verification, export, load, merge, verify
from .bases import BaseConfig
from .methods import S2FT, LoRA
from .model import disabled
from .tune import tune
from .version import __version__

__all__ = ["S2FT", "BaseConfig", "LoRA", "Verification", "__version__", "disabled", "export", "load", "merge", "optim", "tune", "verify"]
