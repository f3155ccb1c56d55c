"""The contract of a piece on a linear."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...bases.linear import base_linear
from ...bases.quantized import QuantizedWeight, Storage
from ...ops.swiglu import swiglu
from ..base import Piece


def like_of(module: nn.Module) -> Tensor:
    """An empty tensor with the dtype and device of what trains at ``module``: fp32, or fp64 on an fp64 base."""
    if isinstance(module, QuantizedWeight):  # whose dense weight would be made anew
        dtype, device = module.compute_dtype, next(module.parameters()).device
    else:
        dtype, device = module.weight.dtype, module.weight.device
    return torch.empty(0, dtype=torch.promote_types(dtype, torch.float32), device=device)


class LinearPiece(Piece):
    """A piece on one frozen linear, whatever its base's storage.

    Attributes:
        in_features, out_features: the shape of the base weight, ``[out_features, in_features]``.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    def linear(self, x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
        """What the linear computes with this piece. Overridden where one fused op does it all; same result."""
        return self.after(base_linear(self.before(x), base, *tensors), x)

    def gated_linear(self, gate: Tensor, up: Tensor, act: str, base: Any, *tensors: Tensor | None) -> Tensor:
        """``linear(act(gate) * up)``. Overridden where the backward can rebuild the product instead of keeping it."""
        return self.linear(swiglu(gate, up, act), base, *tensors)

    def add_original(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` plus what this piece took out of the base, so that a disabled adapter leaves the base as it was."""
        return y

    def prepare_base(self, storage: Storage, *tensors: Tensor | None) -> None:
        """Called once with a quantized base's tensors, which the piece may change in place."""

    def release_base(self, storage: Storage, *tensors: Tensor | None) -> None:
        """Undo :meth:`prepare_base`."""

    def put_back(self, weight: Tensor) -> None:
        """Write what :meth:`prepare_base` took out into a dense copy ``[out, in]`` of the base weight."""

    def lora_factors(self, weight: Callable[[], Tensor] | None = None) -> tuple[Tensor, Tensor] | None:
        """``(A [r, in], B [out, r])`` with ``B·A == ΔW`` bit for bit, or None if there are none.

        ``weight``: makes the dense base weight ``[out, in]`` in fp32, for pieces whose ΔW depends on it.
        """
        return None


class Delta(LinearPiece):
    """A change ``ΔW [out, in]`` to the base weight, in some parameterization: ``after(y, x) = y + x·ΔWᵀ``."""

    @abstractmethod
    def weight_delta(self) -> Tensor:
        """Dense ``ΔW [out, in]`` in fp32: for merging and tests."""

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        merged = weight.to(torch.float32) + self.weight_delta().to(weight.device)
        return merged.to(weight.dtype), bias

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Any]], where: str) -> Any:
        raise ValueError(f"{where}: a {cls.__name__} is part of its base weight; merge it instead of adding it up")
