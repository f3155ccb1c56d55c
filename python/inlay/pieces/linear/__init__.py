"""Pieces on linears: parameterizations of the change to a base weight."""

from .base import Delta, LinearPiece
from .low_rank import LowRankDelta
from .submatrix import ExactSubmatrixDelta, InPlaceSubmatrixDelta, SubmatrixDelta

__all__ = ["Delta", "ExactSubmatrixDelta", "InPlaceSubmatrixDelta", "LinearPiece", "LowRankDelta", "SubmatrixDelta"]
