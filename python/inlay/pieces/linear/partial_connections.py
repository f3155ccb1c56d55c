"""PaCA's form of the submatrix: scaled changes of chosen input columns, under the names that PEFT stores.

Source: Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025, arXiv:2503.01905;
names and scale as PEFT 0.22 has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Delta
from .submatrix import SubmatrixDelta


class PartialConnections(SubmatrixDelta):
    """``ΔW[:, I] = s·paca_delta``, from zero; computed by the submatrix's ops.

    Args:
        weight: the base weight, viewed as ``[out, in]``; only its shape, device and width of dtype are used.
        indices: the trained columns, int64 ``[r]``, distinct. scale: s.
    """

    stored = {"paca_delta": "paca_delta", "paca_indices": "paca_indices"}

    def __init__(self, weight: Tensor, indices: Tensor, scale: float = 1.0, where: str = "paca") -> None:
        like = SubmatrixDelta(weight, indices, "in", where)  # checks them
        Delta.__init__(self, like.in_features, like.out_features)
        self.side, self.scale = "in", scale
        self.paca_delta = nn.Parameter(like.s2ft_values.detach())
        self.register_buffer("paca_indices", like.s2ft_indices)

    @property
    def s2ft_values(self) -> Tensor:  # what the submatrix's ops and merges read
        return self.paca_delta if self.scale == 1.0 else self.paca_delta * self.scale

    @property
    def s2ft_indices(self) -> Tensor:
        return self._buffers["paca_indices"]

    def structure(self) -> Any:
        return self.scale

    @classmethod
    def combine(cls, parts: Any, where: str) -> PartialConnections:
        """The union of the columns, of scale 1."""
        union = torch.cat([delta.paca_indices for _, delta in parts]).unique(sorted=True)
        first = parts[0][1]
        like = first.paca_delta.new_empty(1).expand(first.out_features, first.in_features)
        made = cls(like, union, 1.0, where)
        with torch.no_grad():
            for weight, delta in parts:
                places = torch.searchsorted(union, delta.paca_indices)
                made.paca_delta.index_add_(1, places, delta.s2ft_values.detach(), alpha=weight)
        return made

    def pad(self, r: int) -> None:
        """Grow to ``r`` columns with others, which start at zero and so change nothing."""
        taken = torch.zeros(self.in_features, dtype=torch.bool, device=self.paca_delta.device)
        taken[self.s2ft_indices] = True
        more = torch.nonzero(~taken).squeeze(1)[: r - self.s2ft_indices.numel()]
        columns, order = torch.cat([self.s2ft_indices, more]).sort()
        values = torch.cat([self.paca_delta.detach(), self.paca_delta.new_zeros(self.out_features, more.numel())], 1)
        self.paca_delta = nn.Parameter(values[:, order].contiguous())
        self.register_buffer("paca_indices", columns)

    def extra_repr(self) -> str:
        return f"columns={self.s2ft_indices.numel()}, scale={self.scale:g}"
