"""A small dense map among chosen output channels of a linear: ``y_O + y_O·Mᵀ (+ b)``.

Source: Zhao et al., "SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels", IJCV 2024,
arXiv:2309.08513.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...ops._registry import apply, as_rows, compute_dtype, without_autocast, without_views
from ...roles import widths
from .base import LinearPiece, like_of
from .submatrix import check_indices


class _MapChannels(Function):
    """``y`` with ``y_O + y_O·Mᵀ + b`` at the channels O: keeps ``y_O [M, k]``; products in fp32, one rounding."""

    @staticmethod
    @without_views
    @without_autocast
    def forward(ctx: Any, y: Tensor, matrix: Tensor, bias: Tensor | None, channels: Tensor) -> Tensor:
        chosen, wide = y.index_select(-1, channels), compute_dtype(y)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(chosen if needs[1] else None, matrix if needs[0] else None, channels)
        rows = as_rows(chosen).to(wide)
        mapped = rows + rows @ matrix.to(wide).t()
        mapped = mapped if bias is None else mapped + bias.to(wide)
        return y.index_copy(-1, channels, mapped.to(y.dtype).view(chosen.shape))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        chosen, matrix, channels = ctx.saved_tensors
        needs, wide = ctx.needs_input_grad, compute_dtype(dy)
        given = dy.index_select(-1, channels)
        rows = as_rows(given).to(wide)
        dx = dmatrix = None
        if needs[0]:
            back = rows + rows @ matrix.to(wide)
            dx = dy.index_copy(-1, channels, back.to(dy.dtype).view(given.shape))
        if needs[1]:
            dmatrix = rows.t() @ as_rows(chosen).to(wide)
        return dx, dmatrix, rows.sum(0) if needs[2] else None, None


class ChannelMap(LinearPiece):
    """``M``, fp32 ``[k, k]`` from 0, on the output ``channels``, int64 ``[k]``; merged, rows of the weight and the bias
    are mixed.

    Args:
        module: a linear of any storage.
    """

    stored = {"sct_map": "sct_map", "sct_channels": "sct_channels"}
    sct_bias: nn.Parameter | None

    def __init__(self, module: nn.Module, channels: Tensor, where: str = "sct") -> None:
        super().__init__(*widths(module))
        like = like_of(module)
        channels = check_indices(channels, self.out_features, where)
        self.sct_map = nn.Parameter(like.new_zeros(channels.numel(), channels.numel()))
        self.register_parameter("sct_bias", None)
        self.register_buffer("sct_channels", channels.to(like.device))
        self.base_bias = getattr(module, "bias", None) is not None

    def after(self, y: Tensor, x: Any) -> Tensor:
        return apply(_MapChannels, y, self.sct_map, self.sct_bias, self.sct_channels)

    def check_merge(self, bias: Tensor | None) -> None:
        if self.sct_bias is not None and bias is None:
            raise ValueError(
                'the shift of a channel map is merged into a bias, and this linear has none: wanted shift="mergeable" '
                "(only where there is a bias) or shift=False; otherwise keep the adapter apart"
            )

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.check_merge(bias)
        merged = self._mixed(weight, None)
        return merged, None if bias is None else self._mixed(bias, self.sct_bias)

    def _mixed(self, tensor: Tensor, shift: Tensor | None) -> Tensor:
        """A copy of ``tensor [out, ...]`` with its chosen rows mixed, rounded once."""
        channels, matrix = self.sct_channels.to(tensor.device), self.sct_map.to(tensor.device)
        rows = tensor.index_select(0, channels).to(matrix.dtype)
        mixed = rows + matrix @ rows
        mixed = mixed if shift is None else mixed + shift.to(tensor.device)
        return tensor.index_copy(0, channels, mixed.to(tensor.dtype))

    def lora_factors(self, weight: Callable[[], Tensor] | None = None) -> tuple[Tensor, Tensor] | None:
        """The chosen rows of the weight, and M at them; none where the module has a bias, which the map mixes too."""
        if self.base_bias or self.sct_bias is not None or weight is None:
            return None
        matrix = self.sct_map.detach()
        rows = weight().index_select(0, self.sct_channels).to(matrix.dtype)
        at_rows = matrix.new_zeros(self.out_features, matrix.shape[1]).index_copy(0, self.sct_channels, matrix)
        return rows, at_rows

    def structure(self) -> Any:
        return self.sct_bias is not None

    def load(self, tensors: Mapping[str, Tensor], where: str) -> ChannelMap:
        super().load(tensors, where)
        order = self.sct_channels.argsort()  # another writer may not have sorted them
        self.sct_map.data.copy_(self.sct_map.data[order][:, order])
        for held in (self.sct_bias, self.sct_channels):
            if held is not None:
                held.data.copy_(held.data[order])
        return self

    def changes_anything(self) -> bool:
        return bool(self.sct_map.detach().any()) or (self.sct_bias is not None and bool(self.sct_bias.detach().any()))

    def extra_repr(self) -> str:
        return f"channels={self.sct_channels.numel()}, shift={self.sct_bias is not None}"


class ShiftedChannelMap(ChannelMap):
    """The same with a shift ``b``, fp32 ``[k]`` from 0."""

    stored = {**ChannelMap.stored, "sct_bias": "sct_bias"}

    def __init__(self, module: nn.Module, channels: Tensor, where: str = "sct") -> None:
        super().__init__(module, channels, where)
        self.sct_bias = nn.Parameter(self.sct_map.detach().new_zeros(self.sct_channels.numel()))
