"""The frozen part: storages of a base weight, and the product with it."""

from .linear import base_linear, base_of

__all__ = ["base_linear", "base_of"]
