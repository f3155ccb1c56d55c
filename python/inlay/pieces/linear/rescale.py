"""A learned vector on a linear's output, or on its input: ``γ·W·x`` or ``W·(γ·x)``.

Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS
2022, arXiv:2205.05638. Shapes and keys in files are PEFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...bases.linear import base_linear, is_conv1d
from ...ops._registry import apply, as_rows, autocast_dtype, compute_dtype, without_autocast, without_views
from ...ops.scale_shift import scale_shift
from ...ops.swiglu import swiglu_backward, swiglu_forward
from ...roles import widths
from ..scale_shift import affine
from .base import LinearPiece, like_of
from .submatrix import check_indices


class _ScaledSwiGLU(Function):
    """``γ·act(gate)·up``: keeps gate and up, and rebuilds their product."""

    @staticmethod
    @without_views
    @without_autocast
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str, scale: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, scale)
        ctx.act = act
        return affine(swiglu_forward(gate, up, act), scale, None)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, scale = ctx.saved_tensors
        needs, wide = ctx.needs_input_grad, compute_dtype(dy)
        dgate = dup = dscale = None
        if needs[3]:
            dscale = (as_rows(dy).to(wide) * as_rows(swiglu_forward(gate, up, ctx.act)).to(wide)).sum(0)
        if needs[0] or needs[1]:
            dgate, dup, _ = swiglu_backward(affine(dy, scale, None), gate, up, ctx.act, None)
        return dgate if needs[0] else None, dup if needs[1] else None, None, dscale


class Rescale(LinearPiece):
    """A vector γ, fp32 from 1: ``[out, 1]`` on the output (``side="out"``), or ``[1, in]`` on the input ("in").

    An input that is rescaled and the product of a gated MLP is rebuilt, not kept.
    """

    stored = {"ia3_l": "ia3_l"}

    def __init__(self, module: nn.Module, side: str) -> None:
        super().__init__(*widths(module))
        self.side = side
        self.transposed = is_conv1d(module) or bool(getattr(module, "conv1d", False))  # for PEFT's config
        shape = (1, self.in_features) if side == "in" else (self.out_features, 1)
        self.ia3_l = nn.Parameter(like_of(module).new_ones(shape))

    def before(self, x: Tensor) -> Tensor:
        return scale_shift(x, self.ia3_l.reshape(-1)) if self.side == "in" else x

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.side == "in" else scale_shift(y, self.ia3_l.reshape(-1))

    def gated_linear(self, gate: Tensor, up: Tensor, act: str, base: Any, *tensors: Tensor | None) -> Tensor:
        if self.side == "out":
            return super().gated_linear(gate, up, act, base, *tensors)
        dtype = autocast_dtype(gate)
        scaled = apply(_ScaledSwiGLU, gate.to(dtype), up.to(dtype), act, self.ia3_l.reshape(-1))
        return base_linear(scaled, base, *tensors)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.full().to(weight.device)
        if bias is not None and self.side == "out":
            bias = (bias.to(scale.dtype) * scale[:, 0]).to(bias.dtype)
        return (weight.to(scale.dtype) * scale).to(weight.dtype), bias

    def full(self) -> Tensor:
        """γ for all channels, as a file holds it."""
        return self.ia3_l

    def structure(self) -> Any:
        return self.side

    def changes_anything(self) -> bool:
        return bool((self.ia3_l.detach() != 1).any())

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Any]], where: str) -> Any:
        raise ValueError(
            f"{where}: vectors that scale the same channels do not add up; merge one, train the next on top"
        )


class PartRescale(Rescale):
    """The same on some output channels alone, int64 ``[s]``: keys and values of a projection that makes queries too.

    γ is ``[s, 1]``. A file holds it for all channels, with ones, which is how other libraries read it.
    """

    stored = {"ia3_l": "ia3_l", "ia3_channels": "ia3_channels"}

    def __init__(self, module: nn.Module, channels: Tensor, where: str = "rescale") -> None:
        super().__init__(module, "out")
        channels = check_indices(channels, self.out_features, where)
        self.register_buffer("ia3_channels", channels.to(self.ia3_l.device))
        self.ia3_l = nn.Parameter(self.ia3_l.detach()[: channels.numel()].clone())

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return scale_shift(y, self.ia3_l.reshape(-1), None, self.ia3_channels)

    def full(self) -> Tensor:
        return self.to_file("ia3_l", self.ia3_l)

    def to_file(self, key: str, tensor: Tensor) -> Tensor:
        if key != "ia3_l":
            return tensor
        ones = tensor.new_ones(self.out_features, 1)
        return ones.index_copy(0, self.ia3_channels.to(tensor.device), tensor)

    def from_file(self, key: str, tensor: Tensor) -> Tensor:
        if key == "ia3_channels":  # another writer may not have sorted them
            return tensor.sort().values
        return tensor.index_select(0, self.ia3_channels.to(tensor.device))
