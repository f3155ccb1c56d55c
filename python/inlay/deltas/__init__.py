"""The trainable part: parameterizations of the change to a base weight (WHAT)."""

from .base import Delta
from .submatrix import InPlaceSubmatrixDelta, SubmatrixDelta

__all__ = ["Delta", "InPlaceSubmatrixDelta", "SubmatrixDelta"]
