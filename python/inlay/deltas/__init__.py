"""The trainable part: parameterizations of the change to a base weight (WHAT)."""

from .base import Delta, keeping_width
from .low_rank import LowRankDelta
from .submatrix import ExactSubmatrixDelta, InPlaceSubmatrixDelta, SubmatrixDelta

#: Every key under which a delta's tensors stand in an adapter file.
STORED_KEYS = tuple(dict.fromkeys(key for cls in (InPlaceSubmatrixDelta, LowRankDelta) for key in cls.stored))

__all__ = [
    "STORED_KEYS",
    "Delta",
    "ExactSubmatrixDelta",
    "InPlaceSubmatrixDelta",
    "LowRankDelta",
    "SubmatrixDelta",
    "keeping_width",
]
