"""Pieces: all that model, adapters, estimate and training know about a trainable thing (WHAT)."""

from .base import Piece, keeping_width
from .tensor import Whole

__all__ = ["Piece", "Whole", "keeping_width"]
