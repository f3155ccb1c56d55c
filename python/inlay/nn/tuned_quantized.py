"""TunedLinear on a quantized base."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bases.quantized import QuantizedLinear, QuantizedWeight, dense_linear
from ..deltas import Delta
from .tuned_linear import TunedLinear


class TunedQuantizedLinear(QuantizedWeight, TunedLinear):
    """A quantized frozen base and the named deltas on it.

    Args:
        module: the quantized linear to wrap; its Parameters are shared, and it comes back with :meth:`to_plain`.
    """

    def __init__(self, module: QuantizedLinear) -> None:
        nn.Module.__init__(self)
        *tensors, bias = module.tensors
        self.hold(module.storage, tuple(tensors), bias, module.compute_dtype)
        self.base = module.storage
        self.start(module)

    @property
    def base_tensors(self) -> tuple[Tensor | None, ...]:
        return self.tensors

    @property
    def weight_view(self) -> Tensor:
        """The dequantized base weight ``[out, in]``: a copy."""
        return self.weight

    def add_delta(self, name: str, delta: Delta) -> None:
        if delta.in_place:
            raise ValueError('update="in_place" writes into a dense weight, and this base is quantized; use "additive"')
        super().add_delta(name, delta)
        delta.prepare_base(self.storage, *self.tensors)

    def restore_base(self) -> None:
        """Nothing to restore: no delta writes into a packed weight."""

    def sync(self) -> None:
        """Nothing to synchronize: no delta writes into a packed weight."""

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """The dense module this once was, holding the dequantized and merged weight."""
        return dense_linear(self.merged_weight(), self.bias, self.plain_holder[0].conv1d).train(self.training)


def tuned(module: nn.Module) -> TunedLinear:
    """The tuned form of a linear, whatever its base."""
    return TunedQuantizedLinear(module) if isinstance(module, QuantizedLinear) else TunedLinear(module)
