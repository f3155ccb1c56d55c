"""Scale and shift of a module's output: ``γ·y + β``, on linears of any storage and norms linear in their weight.

Source: Lian, Zhou, Feng, Wang, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", NeurIPS
2022, arXiv:2210.08823.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.linear import is_linear
from ..bases.quantized import QuantizedWeight
from ..nn.probe import generator, same, shallow, takes_only
from ..ops._registry import compute_dtype
from ..ops.scale_shift import scale_shift
from ..roles import widths
from .linear.base import LinearPiece, like_of


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``x [..., n]·scale [n] + shift [n]`` in fp32, rounded once to the dtype of x."""
    wide = x.to(compute_dtype(x))
    if scale is not None and shift is not None:
        wide = torch.addcmul(shift.to(wide.dtype), wide, scale.to(wide.dtype))
    elif scale is not None:
        wide = wide * scale.to(wide.dtype)
    elif shift is not None:
        wide = wide + shift.to(wide.dtype)
    return wide.to(x.dtype)


def norm_offset(module: nn.Module) -> float | None:
    """The ``o`` of a norm that computes ``n(x)·(o + weight) [+ bias]``, or None if ``module`` is proven no such thing.

    Run on random fp32 weights: once scaled and shifted in its output, once in its weights.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not takes_only(module, ()):
        return None
    if module._buffers:  # statistics, which a run would change
        return None
    random, width = generator(), weight.shape[0]
    held, scale, x = (torch.randn(*shape, generator=random) for shape in ((2, width), (width,), (2, 3, width)))
    own = {"weight": held[0]} if bias is None else {"weight": held[0], "bias": held[1]}
    for offset in (0.0, 1.0):
        merged = {"weight": (offset + held[0]) * scale - offset}
        merged |= {} if bias is None else {"bias": held[1] * scale}
        plain, scaled = (_bare(shallow(module, {}, weights)) for weights in (own, merged))
        if same(partial(_times, plain, x, scale), partial(scaled, x)):
            return offset
    return None


def _times(module: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    return module(x) * scale


def _bare(module: nn.Module) -> nn.Module:
    """A copy without the pieces that it may hold already."""
    if "active" in module.__dict__:
        module.__dict__["active"] = ()
    return module


class Scale(LinearPiece):
    """``after(y) = γ·y`` with γ fp32 from 1; merged, the rows of the weight and the bias are scaled.

    Args:
        module: a linear of any storage, or a norm for which :func:`norm_offset` is not None.
    """

    stored = {"ssf_scale": "ssf_scale"}
    ssf_shift: nn.Parameter | None

    def __init__(self, module: nn.Module) -> None:
        linear = is_linear(module) or isinstance(module, QuantizedWeight)
        super().__init__(*(widths(module) if linear else 2 * (module.weight.shape[0],)))
        self.offset = None if linear else norm_offset(module)
        self.ssf_scale = nn.Parameter(like_of(module).new_ones(self.out_features))
        self.register_parameter("ssf_shift", None)

    def after(self, y: Tensor, x: Any) -> Tensor:
        return scale_shift(y, self.ssf_scale, self.ssf_shift)

    def check_merge(self, bias: Tensor | None) -> None:
        if self.ssf_shift is not None and bias is None:
            raise ValueError(
                "a shift of this output needs a bias to merge into, and its module has none: wanted "
                'shift="mergeable" (shifts only where there is a bias) or shift=False; otherwise keep the adapter apart'
            )

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.check_merge(bias)
        scale = self.ssf_scale.to(weight.device)
        wide = weight.to(scale.dtype)
        wide = wide * scale[:, None] if self.offset is None else (self.offset + wide) * scale - self.offset
        if bias is not None:
            bias = affine(bias.to(scale.dtype), scale, self.ssf_shift).to(bias.dtype)
        return wide.to(weight.dtype), bias

    def changes_anything(self) -> bool:
        return bool((self.ssf_scale.detach() != 1).any())

    def extra_repr(self) -> str:
        return f"channels={self.out_features}, shift={self.ssf_shift is not None}"


class ScaleShift(Scale):
    """``after(y) = γ·y + β`` with β fp32 from 0; merging adds it to the bias, which the module must have."""

    stored = {"ssf_scale": "ssf_scale", "ssf_shift": "ssf_shift"}

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.ssf_shift = nn.Parameter(torch.zeros_like(self.ssf_scale))

    def changes_anything(self) -> bool:
        shift: Any = self.ssf_shift
        return super().changes_anything() or bool(shift.detach().any())
