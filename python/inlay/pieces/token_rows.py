"""Rows of tokens, of an embedding or of an output head, under the names that PEFT stores.

What trains are the rows themselves, as in PEFT: on a base whose new tokens began otherwise they mean the same.

Source: peft/tuners/trainable_tokens/layer.py of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..bases.linear import is_conv1d
from ..bases.quantized import QuantizedWeight
from ..roles import widths
from .base import Piece
from .embedding import EmbeddingPiece, EmbeddingRows, check_tokens, summed_rows, with_rows
from .linear.base import Delta
from .linear.submatrix import SubmatrixDelta

# To a type checker this is the piece it will be mixed into.
if TYPE_CHECKING:
    _Piece = Piece
else:
    _Piece = object


class HoldsRows(_Piece):
    """Mixin of a piece on rows: ``trainable_tokens_delta`` fp32 ``[k, H]`` from the base's rows, and what it changes.

    Weight decay pulls towards zero.
    """

    stored = {"trainable_tokens_delta": "trainable_tokens_delta", "token_indices": "token_indices"}
    needs_dense_base = True
    trainable_tokens_delta: nn.Parameter

    def hold(self, weight: Tensor, indices: Tensor) -> None:
        """Begin with the rows ``indices``, sorted, of ``weight [V, H]``."""
        original = weight.detach().index_select(0, indices.to(weight.device))
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.trainable_tokens_delta = nn.Parameter(original.to(wide, copy=True))
        self.register_buffer("token_indices", indices.to(weight.device))
        self.register_buffer("token_original", original, persistent=False)  # what the base has, here and now

    @property
    def s2ft_values(self) -> Tensor:  # what the ops on rows read
        return self.trainable_tokens_delta - self.token_original.to(self.trainable_tokens_delta.dtype)

    @property
    def s2ft_indices(self) -> Tensor:
        return self._buffers["token_indices"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """The original rows are the base's: they go where it goes."""
        original = self._buffers["token_original"]
        super()._apply(fn, recurse)
        self.token_original = fn(original)
        return self

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return with_rows(weight, self.s2ft_indices, self.s2ft_values), bias

    def take(self, other: Any) -> None:
        super().take(other)
        self.token_original.copy_(other.token_original)


def _combined(parts: Sequence[tuple[float, Any]], made: Any) -> Any:
    """``made``, of the class of ``parts`` and without tensors, with their weighted sum."""
    union = torch.cat([piece.token_indices for _, piece in parts]).unique(sorted=True)
    first = parts[0][1]
    originals = first.token_original.new_zeros(union.numel(), first.token_original.shape[1])
    for _, piece in parts:
        originals[torch.searchsorted(union, piece.token_indices)] = piece.token_original
    change = summed_rows(parts, union)
    made.trainable_tokens_delta = nn.Parameter(originals.to(change.dtype) + change)
    made.register_buffer("token_indices", union)
    made.register_buffer("token_original", originals, persistent=False)
    return made


class TokenEmbeddings(HoldsRows, EmbeddingRows):
    """Rows of an embedding's table."""

    def __init__(self, module: nn.Module, indices: Tensor, where: str = "tokens") -> None:
        EmbeddingPiece.__init__(self, module, where)
        self.hold(module.weight, check_tokens(indices, self.tokens, where))

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Any]], where: str) -> Any:
        return _combined(parts, cls.like(parts[0][1]))


class TokenOutputs(HoldsRows, SubmatrixDelta):
    """Rows of an output head that is not tied."""

    def __init__(self, module: nn.Module, indices: Tensor, where: str = "tokens") -> None:
        if isinstance(module, QuantizedWeight) or is_conv1d(module):
            raise ValueError(
                f"{where}: wanted a dense head, got {type(module).__name__}; load the model with the head dense "
                "(BaseConfig(skip_modules=...)), or head=False to train its tokens' embeddings alone"
            )
        Delta.__init__(self, *widths(module))
        self.side = "out"
        self.hold(module.weight, check_tokens(indices, self.out_features, where))

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Any]], where: str) -> Any:
        first: Any = parts[0][1]
        made: Any = cls.__new__(cls)
        Delta.__init__(made, first.in_features, first.out_features)
        made.side = "out"
        return _combined(parts, made)

    def extra_repr(self) -> str:
        return f"tokens={self.token_indices.numel()} of {self.out_features}"
