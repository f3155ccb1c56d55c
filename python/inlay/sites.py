"""Where a piece can sit: linears, other modules with an output, single tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .bases.linear import is_linear
from .bases.quantized import QuantizedWeight


@dataclass(frozen=True)
class Site:
    """A place in a model.

    Attributes:
        path: full name of the module (of the tensor, for a :class:`TensorSite`), as ``named_modules`` has it.
    """

    path: str

    def module(self, model: nn.Module) -> nn.Module:
        """The module at this place."""
        return model.get_submodule(self.path)


class LinearSite(Site):
    """A linear of any storage: ``nn.Linear``, transformers' Conv1D, a quantized one. Takes a ``LinearPiece``."""


class OutputSite(Site):
    """Any other module of one input and one output: a norm, an embedding. Takes a ``Piece``."""


class TensorSite(Site):
    """A Parameter (or buffer) by its state-dict key, which trains whole. Takes a :class:`inlay.pieces.Whole`."""

    def module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.path.rpartition(".")[0])

    def tensor(self, model: nn.Module) -> Tensor:
        """The tensor itself."""
        held = getattr(self.module(model), self.path.rpartition(".")[2])
        assert isinstance(held, Tensor)
        return held


def site_of(model: nn.Module, path: str) -> Site:
    """The site of a piece on the module ``path``."""
    module = model.get_submodule(path)
    return LinearSite(path) if is_linear(module) or isinstance(module, QuantizedWeight) else OutputSite(path)
