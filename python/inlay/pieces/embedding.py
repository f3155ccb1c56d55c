"""Changes of a table of embeddings: of chosen rows, or of low rank.

Where another module shares the table (a tied head, a decoder's embedding), the same piece acts there too, see
:mod:`inlay.pieces.tied`: one Parameter, saved and merged once.

Sources: the low-rank change is PEFT's LoRA on an embedding (peft/tuners/lora/layer.py of PEFT 0.21), after Hu et al.,
"LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops import submatrix_add_delta, submatrix_linear
from ..ops._registry import apply, as_rows, compute_dtype, without_autocast, without_views
from ..ops.lora_linear import add_low_rank, lora_linear
from .base import Piece
from .linear.base import like_of
from .linear.submatrix import check_indices
from .lookup import Lookup, lookup_of
from .tied import Tied, TiedEmbedding, TiedLinear


def places_of(ids: Tensor, indices: Tensor) -> Tensor:
    """Where each of ``ids [...]`` is in ``indices [k]``, sorted int64; k for those that are not there."""
    count = indices.numel()
    places = torch.searchsorted(indices, ids.to(indices.dtype).contiguous())
    return torch.where(indices[places.clamp(max=count - 1)] == ids, places, count)


class _AddRows(Function):
    """``y + scale·values[place of id]`` at the ids among ``indices``: keeps the ids alone; one rounding."""

    @staticmethod
    @without_views
    @without_autocast
    def forward(
        ctx: Any, y: Tensor, values: Tensor, indices: Tensor, ids: Tensor, scale: float, padding: int | None
    ) -> Tensor:
        ctx.save_for_backward(indices, ids)
        ctx.scale, ctx.padding = scale, padding
        rows = torch.cat([values, values.new_zeros(1, values.shape[1])])
        return torch.add(y, nn.functional.embedding(places_of(ids, indices), rows), alpha=scale).to(y.dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        indices, ids = ctx.saved_tensors
        dvalues = None
        if ctx.needs_input_grad[1]:
            count, places = indices.numel(), places_of(ids, indices)
            if ctx.padding is not None:
                places = places.masked_fill(ids == ctx.padding, count)
            rows = as_rows(dy).to(compute_dtype(dy))
            dvalues = _sums(rows, places.reshape(-1), count + 1, count)[:count] * ctx.scale
        return dy if ctx.needs_input_grad[0] else None, dvalues, None, None, None, None


def _sums(rows: Tensor, places: Tensor, count: int, skip: int) -> Tensor:
    """``[count, n]``: the sums of ``rows [N, n]`` by place, the same in every run; those at ``skip`` left out."""
    return torch.ops.aten.embedding_dense_backward(rows, places, count, skip, False)


class _AddLowRankRows(Function):
    """``y + scale·B·A[:, ids]``: keeps the ids, and gathers from A again; products in fp32, one rounding."""

    @staticmethod
    @without_views
    @without_autocast
    def forward(ctx: Any, y: Tensor, a: Tensor, b: Tensor, ids: Tensor, scale: float, padding: int | None) -> Tensor:
        ctx.save_for_backward(a, b, ids)
        ctx.scale, ctx.padding = scale, padding
        change = nn.functional.embedding(ids, a.t()) @ b.t()
        return torch.add(y, change, alpha=scale).to(y.dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b, ids = ctx.saved_tensors
        needs, flat = ctx.needs_input_grad, ids.reshape(-1)
        rows = as_rows(dy).to(compute_dtype(dy))
        if ctx.padding is not None:
            rows = rows.masked_fill((flat == ctx.padding)[:, None], 0.0)
        da = _sums((rows @ b) * ctx.scale, flat, a.shape[1], -1).t().contiguous() if needs[1] else None
        db = rows.t() @ a.index_select(1, flat).t() * ctx.scale if needs[2] else None
        return dy if needs[0] else None, da, db, None, None, None


class EmbeddingPiece(Piece):
    """A change ``ΔE [V, H]`` of the table of one embedding, and of whatever shares it.

    Args:
        module: an ``nn.Embedding``, or a subclass that multiplies its output by a number. where: its name.
    """

    def __init__(self, module: nn.Module, where: str) -> None:
        super().__init__()
        self.lookup = lookup_of(module, where)
        self.tokens, self.width = module.weight.shape

    @classmethod
    def like(cls, first: Any) -> Any:
        """A piece of this class for the embedding of ``first``, without tensors yet."""
        made: Any = cls.__new__(cls)
        nn.Module.__init__(made)
        made.lookup, made.tokens, made.width = first.lookup, first.tokens, first.width
        return made

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return self.look_up(y, x, self.lookup)

    @abstractmethod
    def look_up(self, y: Tensor, ids: Tensor, lookup: Lookup) -> Tensor:
        """``y [..., H] + scale·ΔE[ids]`` in an embedding that does ``lookup``."""

    @abstractmethod
    def multiply(self, y: Tensor, x: Tensor) -> Tensor:
        """``y [..., V] + x·ΔEᵀ`` in a head that shares the table."""

    @abstractmethod
    def linear(self, x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
        """The same with the head's own product, by the op that does both."""

    def tied(self, module: nn.Module, where: str) -> Tied:
        if isinstance(module, nn.Embedding):
            return TiedEmbedding(self, lookup_of(module, where))
        return TiedLinear(self, module, where)


class EmbeddingRows(EmbeddingPiece):
    """``ΔE[I, :]``, fp32 ``[k, H]`` from zero: no other row has a gradient, nor any tensor the size of the table.

    Weight decay pulls towards the base's rows.

    Args:
        indices: token ids, int64 ``[k]``, any order, distinct.
    """

    stored = {"s2ft_values": "s2ft_values", "s2ft_indices": "s2ft_indices"}

    def __init__(self, module: nn.Module, indices: Tensor, where: str = "embedding") -> None:
        super().__init__(module, where)
        like, indices = like_of(module), check_tokens(indices, self.tokens, where)
        self.s2ft_values = nn.Parameter(like.new_zeros(indices.numel(), self.width))
        self.register_buffer("s2ft_indices", indices.to(like.device))

    def look_up(self, y: Tensor, ids: Tensor, lookup: Lookup) -> Tensor:
        values, indices = self.s2ft_values.to(y.device), self.s2ft_indices.to(y.device)
        return apply(_AddRows, y, values, indices, ids, lookup.scale(y), lookup.padding)

    def multiply(self, y: Tensor, x: Tensor) -> Tensor:
        values, indices = self.s2ft_values.to(x.device), self.s2ft_indices.to(x.device)
        return submatrix_add_delta(y, x, values, indices, "out")

    def linear(self, x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
        values, indices = self.s2ft_values.to(x.device), self.s2ft_indices.to(x.device)
        return submatrix_linear(x, values, indices, "out", base, *tensors)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return with_rows(weight, self.s2ft_indices, self.s2ft_values), bias

    def changes_anything(self) -> bool:
        return bool(self.s2ft_values.detach().any())

    def load(self, tensors: Mapping[str, Tensor], where: str) -> EmbeddingRows:
        super().load(tensors, where)
        order = self.s2ft_indices.argsort()  # another writer may not have sorted them
        for attribute in self.stored.values():
            held = getattr(self, attribute).data
            held.copy_(held[order])
        return self

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Any]], where: str) -> Any:
        """The union of the rows."""
        made = cls.like(parts[0][1])
        made.register_buffer("s2ft_indices", torch.cat([piece.s2ft_indices for _, piece in parts]).unique(sorted=True))
        made.s2ft_values = nn.Parameter(summed_rows(parts, made.s2ft_indices))
        return made

    def extra_repr(self) -> str:
        return f"tokens={self.s2ft_indices.numel()} of {self.tokens}"


def summed_rows(parts: Sequence[tuple[float, Any]], union: Tensor) -> Tensor:
    """``Σ weight·values`` of pieces on rows, on the rows ``union``."""
    like = parts[0][1].s2ft_values.detach()
    total = like.new_zeros(union.numel(), like.shape[1])
    for weight, piece in parts:
        total.index_add_(0, torch.searchsorted(union, piece.s2ft_indices), piece.s2ft_values.detach(), alpha=weight)
    return total


def check_tokens(indices: Tensor, tokens: int, where: str) -> Tensor:
    """Token ids as sorted int64 ``[k]``; ValueError where one is repeated or not among the ``tokens`` of the table."""
    beyond = [int(i) for i in indices.reshape(-1) if not 0 <= int(i) < tokens]
    if beyond:
        raise ValueError(
            f"{where}: wanted token ids from 0 to {tokens - 1}, all its table has, got {beyond[0]}; give the model "
            "more tokens first, with resize_token_embeddings"
        )
    return check_indices(indices, tokens, where)


def with_rows(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """A copy of ``weight [V, H]`` with ``values [k, H]`` added to the rows ``indices``, rounded once."""
    indices, values = indices.to(weight.device), values.to(weight.device)
    changed = weight.index_select(0, indices).to(values.dtype) + values
    return weight.index_copy(0, indices, changed.to(weight.dtype))


class EmbeddingLowRank(EmbeddingPiece):
    """``ΔE = s·(B·A)ᵀ`` with A fp32 ``[r, V]`` zero and B ``[H, r]`` from a normal distribution, as PEFT begins.

    Args:
        r: rank. scale: s. generator: where B is drawn from.
    """

    stored = {"lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B"}

    def __init__(
        self, module: nn.Module, r: int, scale: float, generator: torch.Generator | None = None, where: str = "lora"
    ) -> None:
        super().__init__(module, where)
        like = like_of(module)
        self.scale = scale
        self.lora_embedding_A = nn.Parameter(like.new_zeros(r, self.tokens))
        self.lora_embedding_B = nn.Parameter(
            torch.randn(self.width, r, generator=generator).to(like.device, like.dtype)
        )

    def look_up(self, y: Tensor, ids: Tensor, lookup: Lookup) -> Tensor:
        a, b = self.lora_embedding_A.to(y.device), self.lora_embedding_B.to(y.device)
        return apply(_AddLowRankRows, y, a, b, ids, self.scale * lookup.scale(y), lookup.padding)

    def multiply(self, y: Tensor, x: Tensor) -> Tensor:
        return add_low_rank(y, x, *self._factors(x), self.scale)

    def linear(self, x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
        return lora_linear(x, *self._factors(x), self.scale, base, *tensors)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(A [r, H], B [V, r])`` of the head."""
        return self.lora_embedding_B.to(x.device).t(), self.lora_embedding_A.to(x.device).t()

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self.scale * (self.lora_embedding_B @ self.lora_embedding_A).t()
        return (weight.to(change.dtype) + change.to(weight.device)).to(weight.dtype), bias

    def changes_anything(self) -> bool:
        return bool(self.lora_embedding_A.detach().any())

    def structure(self) -> Any:
        return self.scale

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Any]], where: str) -> Any:
        """The factors side by side, of scale 1."""
        made = cls.like(parts[0][1])
        made.scale = 1.0
        factors = [(piece.lora_embedding_A.detach(), weight * piece.scale) for weight, piece in parts]
        made.lora_embedding_A = nn.Parameter(torch.cat([scale * a for a, scale in factors]))
        made.lora_embedding_B = nn.Parameter(torch.cat([piece.lora_embedding_B.detach() for _, piece in parts], dim=1))
        return made

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_embedding_A.shape[0]

    def pad(self, r: int) -> None:
        """Grow to rank ``r`` with zeros, which changes nothing."""
        missing = r - self.lora_embedding_A.shape[0]
        self.lora_embedding_A = nn.Parameter(nn.functional.pad(self.lora_embedding_A.detach(), (0, 0, 0, missing)))
        self.lora_embedding_B = nn.Parameter(nn.functional.pad(self.lora_embedding_B.detach(), (0, missing)))

    def extra_repr(self) -> str:
        return f"r={self.lora_embedding_A.shape[0]}, scale={self.scale:g}"
