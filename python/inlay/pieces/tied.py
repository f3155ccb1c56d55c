"""What stands on a module that shares the weight of another one, which carries a piece: the piece's own, once more.

It owns no tensor: it has no key in a state dict or a file, and nothing of it trains but what the piece trains.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..bases.linear import computes_linear, is_conv1d, is_linear
from ..roles import widths
from .base import Piece
from .linear.base import LinearPiece


class Tied(Piece):
    """The effect of ``source`` on another module with the same weight."""

    source_held: tuple[Any]  # a tuple, so that it is not a submodule and adds no state-dict keys

    @property
    def source(self) -> Any:
        """The piece that owns the tensors."""
        return self.source_held[0]

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.source.merge(weight, bias)

    def changes_anything(self) -> bool:
        return self.source.changes_anything()


class TiedEmbedding(Tied):
    """On another embedding, which does ``lookup`` with the same table."""

    def __init__(self, source: Piece, lookup: Any) -> None:
        super().__init__()
        self.source_held, self.lookup = (source,), lookup

    def after(self, y: Tensor, x: Any) -> Tensor:
        return self.source.look_up(y, x, self.lookup)


class TiedLinear(Tied, LinearPiece):
    """On a linear, usually the output head, whose weight is the table."""

    def __init__(self, source: Piece, module: nn.Module, where: str) -> None:
        if not is_linear(module) or is_conv1d(module) or not computes_linear(module):
            raise ValueError(
                f"{where}: a {type(module).__name__} shares the table of an embedding, and neither looks up its rows "
                "nor multiplies by it as an nn.Linear: a change of the table has no form there; untie them"
            )
        LinearPiece.__init__(self, *widths(module))
        self.source_held = (source,)

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return self.source.multiply(y, x)

    def linear(self, x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
        return self.source.linear(x, base, *tensors)
