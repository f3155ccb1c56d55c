"""Adapters on disk and off the model: save, load, combine, merge, export, verify."""

from .combine import add_weighted_adapter
from .export import export
from .load import hotswap, load_onto
from .merge import merge
from .merge_files import merge_files
from .save import save_adapter
from .verify import Verification, verify

__all__ = [
    "Verification",
    "add_weighted_adapter",
    "export",
    "hotswap",
    "load_onto",
    "merge",
    "merge_files",
    "save_adapter",
    "verify",
]
