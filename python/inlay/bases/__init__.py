"""The frozen part: storages of a base weight, and the product with it."""

from .config import BaseConfig, quantize_linears
from .four_bit import FourBit
from .int8 import Int8
from .linear import base_linear, base_of
from .quantized import STORAGES, QuantizedLinear, Storage

__all__ = [
    "STORAGES",
    "BaseConfig",
    "FourBit",
    "Int8",
    "QuantizedLinear",
    "Storage",
    "base_linear",
    "base_of",
    "quantize_linears",
]
