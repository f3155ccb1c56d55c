"""TunedLinear on a quantized base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..bases.quantized import QuantizedLinear, QuantizedWeight, dense_linear
from ..pieces import Piece
from .tuned_linear import TunedLinear


class TunedQuantizedLinear(QuantizedWeight, TunedLinear):
    """A quantized frozen base and the named pieces on it.

    Args:
        module: the quantized linear to wrap; its Parameters are shared, and it comes back with :meth:`to_plain`.
    """

    def __init__(self, module: QuantizedLinear) -> None:
        nn.Module.__init__(self)
        *tensors, bias = module.tensors
        self.hold(module.storage, tuple(tensors), bias, module.compute_dtype)
        self.base = module.storage
        self.conv1d = module.conv1d
        self.start(module)

    @property
    def base_tensors(self) -> tuple[Tensor | None, ...]:
        return self.tensors

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.plain_holder[0].compute_dtype = self.compute_dtype
        return self

    def dense_base(self, dtype: torch.dtype) -> Tensor:
        """The dequantized base weight ``[out, in]``, with what a delta took out of it put back."""
        weight = super().dense_base(dtype)
        for delta in self.pieces().values():
            delta.put_back(weight)
        return weight

    @property
    def weight_view(self) -> Tensor:
        return self.dense_base(self.compute_dtype)

    def add_delta(self, name: str, delta: Any) -> None:
        if delta.in_place:
            raise ValueError('update="in_place" writes into a dense weight, and this base is quantized; use "additive"')
        super().add_delta(name, delta)
        delta.prepare_base(self.storage, *self.tensors)

    def restore_base(self) -> None:
        """Nothing to restore: no delta writes into a packed weight."""

    def sync(self) -> None:
        """Nothing to synchronize: no delta writes into a packed weight."""

    @torch.no_grad()
    def merged_onto(self, onto: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``onto`` (the dequantized base if None) ``[out, in]`` and the bias, with the active pieces in them."""
        weight = self.dense_base(self.compute_dtype) if onto is None else onto
        bias = self.bias
        for delta in self.active_deltas():
            weight, bias = delta.merge(weight, bias)
        return weight, bias

    def swap_delta(self, name: str, other: Piece) -> None:
        delta = self.pieces()[name]
        delta.release_base(self.storage, *self.tensors)
        delta.take(other)
        delta.prepare_base(self.storage, *self.tensors)

    def remove_delta(self, name: str) -> None:
        delta = self.pieces()[name]
        super().remove_delta(name)
        delta.release_base(self.storage, *self.tensors)

    def to_plain(self, onto: Tensor | None = None) -> nn.Module:
        """The dense module this once was, holding ``onto`` or the dequantized base, and the active pieces."""
        weight, bias = self.merged_onto(onto)
        return dense_linear(weight, bias, self.conv1d).train(self.training)


def tuned(module: nn.Module) -> TunedLinear:
    """The tuned form of a linear, whatever its base."""
    return TunedQuantizedLinear(module) if isinstance(module, QuantizedLinear) else TunedLinear(module)
