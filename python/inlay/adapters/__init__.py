"""Adapters on disk and off the model: save, load, merge, export, verify."""

from .export import export
from .load import load
from .merge import merge
from .save import save_adapter
from .verify import Verification, verify

__all__ = ["Verification", "export", "load", "merge", "save_adapter", "verify"]
