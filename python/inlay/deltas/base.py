"""The contract of a delta: the trainable change to one base weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bases.linear import base_linear
from ..bases.quantized import Storage
from ..ops.swiglu import swiglu


def keeping_width(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn``, what ``Module.to`` does to each tensor, but that tensors of 32 bits or more keep at least 32.

    ``model.to(torch.bfloat16)`` and ``.half()`` are meant for the base: trainables, their gradients and their
    optimizer's states stay as exact as they are. Between fp32 and fp64 they go along.
    """

    def wide(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if tensor.is_floating_point() and tensor.dtype.itemsize >= 4 > moved.dtype.itemsize:
            return tensor.to(moved.device, torch.float32)
        return moved

    return wide


class Delta(nn.Module, ABC):
    """Trainable change ``ΔW [out, in]`` to one frozen base weight, in some parameterization.

    Trainables are ordinary fp32 ``nn.Parameter``s whose ``.grad`` has their own shape, so gradient
    accumulation, clipping, DDP and any torch optimizer work unmodified.

    Attributes:
        in_features, out_features: the shape of the base weight, ``[out_features, in_features]``.
        in_place: True if the delta writes its values into the base weight.
        owns_base: True if the delta changes what the base holds; it must be the only one on its base.
        needs_quantized_base: True if it means nothing on a dense base.
        stored: what an adapter file stores, key in the file to attribute, in the order it is written.
    """

    stored: ClassVar[dict[str, str]] = {}
    in_place: bool = False
    owns_base: bool = False
    needs_quantized_base: bool = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move between devices, but stay wide where the model goes to 16 bits: see :func:`keeping_width`."""
        return super()._apply(keeping_width(fn), recurse)

    @abstractmethod
    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """``y + x·ΔWᵀ`` for ``x [..., in]``, ``y [..., out]``; saves only what its own gradient needs."""

    def linear(self, x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
        """``base(x) + x·ΔWᵀ``. Deltas override this where one fused op does both; same result."""
        return self.add_to(base_linear(x, base, *tensors), x)

    def gated_linear(self, gate: Tensor, up: Tensor, act: str, base: Any, *tensors: Tensor | None) -> Tensor:
        """``linear(act(gate) * up)``. Overridden where the backward can rebuild the product instead of keeping it."""
        return self.linear(swiglu(gate, up, act), base, *tensors)

    def add_original(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` plus what this delta took out of the base, so that a disabled adapter leaves the base as it was."""
        return y

    def prepare_base(self, storage: Storage, *tensors: Tensor | None) -> None:
        """Called once with a quantized base's tensors, which the delta may change in place."""

    def release_base(self, storage: Storage, *tensors: Tensor | None) -> None:
        """Undo :meth:`prepare_base`."""

    def put_back(self, weight: Tensor) -> None:
        """Write what :meth:`prepare_base` took out into a dense copy ``[out, in]`` of the base weight."""

    @abstractmethod
    def weight_delta(self) -> Tensor:
        """Dense ``ΔW [out, in]`` in fp32: for merging and tests."""

    def merge_into(self, weight: Tensor) -> Tensor:
        """A merged copy of ``weight [out, in]`` in its own dtype: one rounding of the fp32 sum."""
        merged = weight.to(torch.float32) + self.weight_delta().to(weight.device)
        return merged.to(weight.dtype)

    def lora_factors(self) -> tuple[Tensor, Tensor] | None:
        """``(A [r, in], B [out, r])`` with ``B·A == ΔW`` bit for bit, or None if there are none."""
        return None

    @abstractmethod
    def changes_anything(self) -> bool:
        """False while ΔW is still zero."""

    def tensors(self) -> dict[str, Tensor]:
        """What an adapter file stores of this delta, by key in the file."""
        return {key: getattr(self, attribute).detach() for key, attribute in self.stored.items()}

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Delta]], where: str) -> Delta:
        """A delta whose ``ΔW`` is ``Σ weight·ΔW`` of ``parts``, all of this class; ``where`` names the linear.

        Raises:
            ValueError: deltas of this kind do not add up, or these do not.
        """
        raise ValueError(f"{where}: a {cls.__name__} is part of its base weight; merge it instead of adding it up")

    def check_swap(self, other: Delta, where: str) -> None:
        """ValueError unless the tensors of ``other`` fit into those of this delta."""
        mine = {key: tuple(tensor.shape) for key, tensor in self.tensors().items()}
        theirs = {key: tuple(tensor.shape) for key, tensor in other.tensors().items()}
        if type(self) is not type(other) or self.structure() != other.structure() or mine != theirs:
            raise ValueError(
                f"{where}: wanted a {type(self).__name__} with tensors {mine} to swap in, got a "
                f"{type(other).__name__} with {theirs}"
            )

    def structure(self) -> Any:
        """What, beside shapes, two deltas must share to take each other's tensors."""
        return None

    def take(self, other: Delta) -> None:
        """Take the tensors of ``other``, which :meth:`check_swap` found to fit, into this delta's own memory."""
        for attribute in self.stored.values():
            getattr(self, attribute).data.copy_(getattr(other, attribute))

    def load(self, tensors: Mapping[str, Tensor], where: str) -> Delta:
        """Take the values of an adapter file's ``tensors``; returns self.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape or not finite; the message starts with ``where``.
        """
        if set(tensors) != set(self.stored):
            got = sorted(tensors)
            raise ValueError(f"{where}: wanted tensors {sorted(self.stored)}, got {got}; the file is incomplete")
        for key, attribute in self.stored.items():
            held = getattr(self, attribute)
            if held.shape != tensors[key].shape:
                raise ValueError(f"{where}.{key}: wanted shape {tuple(held.shape)}, got {tuple(tensors[key].shape)}")
            if tensors[key].is_floating_point() and not torch.isfinite(tensors[key]).all():
                raise ValueError(f"{where}.{key} holds NaN or infinity; the file is corrupt: save the adapter again")
            held.data.copy_(tensors[key])
        return self
