"""Vectors on the input of a linear: gates ``(1 + A)·x`` on all channels, offsets ``x + v`` on chosen ones.

On an attention output the input channels are those of the heads.

Source: Yin, Ye, Durrett, "LoFiT: Localized Fine-tuning on LLM Representations", NeurIPS 2024, arXiv:2406.01563.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.scale_shift import scale_shift
from .base import LinearPiece
from .submatrix import check_indices


class HeadGate(LinearPiece):
    """``W·((1 + A)·x)``, A fp32 ``[in]`` from 0; merged, the columns of the weight are scaled."""

    stored = {"lofit_gate": "lofit_gate"}

    def __init__(self, in_features: int, out_features: int, like: Tensor) -> None:
        """``like``: gives dtype and device, see :func:`.base.like_of`."""
        super().__init__(in_features, out_features)
        self.lofit_gate = nn.Parameter(like.new_zeros(in_features))

    def before(self, x: Tensor) -> Tensor:
        return scale_shift(x, 1 + self.lofit_gate)

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return y

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = 1 + self.lofit_gate.to(weight.device)
        return (weight.to(scale.dtype) * scale).to(weight.dtype), bias

    def changes_anything(self) -> bool:
        return bool(self.lofit_gate.detach().any())


class HeadOffset(LinearPiece):
    """``W·(x + v)``, v fp32 ``[s]`` from 0 on the input ``channels``, int64 ``[s]``; merged, the bias takes ``W·v``.

    Nothing is kept for its backward.
    """

    stored = {"lofit_offset": "lofit_offset", "lofit_channels": "lofit_channels"}

    def __init__(
        self, in_features: int, out_features: int, like: Tensor, channels: Tensor, where: str = "lofit"
    ) -> None:
        """``like``: gives dtype and device, see :func:`.base.like_of`."""
        super().__init__(in_features, out_features)
        channels = check_indices(channels, in_features, where)
        self.lofit_offset = nn.Parameter(like.new_zeros(channels.numel()))
        self.register_buffer("lofit_channels", channels.to(like.device))

    def before(self, x: Tensor) -> Tensor:
        return scale_shift(x, None, self.lofit_offset, self.lofit_channels)

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return y

    def check_merge(self, bias: Tensor | None) -> None:
        if bias is None:
            raise ValueError(
                "an offset of heads is merged into the bias of the attention output, and this one has none: keep the "
                'adapter apart (inlay.load), or train gates, which merge (stage="gates")'
            )

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.check_merge(bias)
        assert bias is not None
        offset = self.lofit_offset.to(weight.device)
        columns = weight.index_select(1, self.lofit_channels.to(weight.device)).to(offset.dtype)
        return weight, (bias.to(offset.dtype) + columns @ offset).to(bias.dtype)

    def changes_anything(self) -> bool:
        return bool(self.lofit_offset.detach().any())

    def load(self, tensors: Mapping[str, Tensor], where: str) -> HeadOffset:
        super().load(tensors, where)
        order = self.lofit_channels.argsort()  # another writer may not have sorted them
        for held in (self.lofit_offset, self.lofit_channels):
            held.data.copy_(held.data[order])
        return self

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Any]], where: str) -> HeadOffset:
        """The union of the channels."""
        first = parts[0][1]
        union = torch.cat([piece.lofit_channels for _, piece in parts]).unique(sorted=True)
        made = cls(first.in_features, first.out_features, first.lofit_offset.detach(), union, where)
        with torch.no_grad():
            for weight, piece in parts:
                places = torch.searchsorted(union, piece.lofit_channels)
                made.lofit_offset.index_add_(0, places, piece.lofit_offset.detach(), alpha=weight)
        return made
