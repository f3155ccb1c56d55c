"""The frozen part: storages of a base weight, and the product with it."""

from .bitsandbytes_format import convert_model
from .config import BaseConfig, quantize_linears
from .four_bit import FourBit
from .int8 import Int8
from .linear import base_linear, base_of
from .quantized import STORAGES, QuantizedLinear, QuantizedWeight, Storage

__all__ = [
    "STORAGES",
    "BaseConfig",
    "FourBit",
    "Int8",
    "QuantizedLinear",
    "QuantizedWeight",
    "Storage",
    "base_linear",
    "base_of",
    "convert_model",
    "quantize_linears",
]
