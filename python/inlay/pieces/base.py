"""The contract of a piece: a trainable thing on one module of a frozen model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

_P = TypeVar("_P", bound="Piece")


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


class Piece(nn.Module, ABC):
    """What an adapter trains at one module: ordinary fp32 ``nn.Parameter``s whose ``.grad`` has their own shape, so
    that gradient accumulation, clipping, DDP and any torch optimizer work unmodified.

    A piece changes what its module computes from ``x`` to ``after(module(before(x)), x)``. A new piece makes that
    begin as the module itself, bit for bit, and says in :meth:`merge` what weights compute the same. Several pieces on
    one module are nested, the first one innermost.

    Attributes:
        in_place: True if the piece writes its values into the base weight.
        owns_base: True if the piece changes what the base holds; it must be the only one on its base.
        needs_quantized_base: True if it means nothing on a dense base.
        needs_dense_base: True if it means nothing on a quantized base.
        draws_by_sample: True if training draws a random number for a whole sample, the first dimension of its input.
        stored: what an adapter file stores, key in the file to attribute, in the order it is written.
    """

    stored: ClassVar[dict[str, str]] = {}
    in_place: bool = False
    owns_base: bool = False
    needs_quantized_base: bool = False
    needs_dense_base: bool = False
    draws_by_sample: bool = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move between devices, but stay wide where the model goes to 16 bits: see :func:`keeping_width`."""
        return super()._apply(keeping_width(fn), recurse)

    # --- what it computes ---

    def before(self, x: Any) -> Any:
        """The module's input, changed."""
        return x

    @abstractmethod
    def after(self, y: Tensor, x: Any) -> Tensor:
        """The module's output ``y`` for the input ``x``, changed; saves only what its own gradient needs."""

    @abstractmethod
    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Copies of the module's ``weight`` (``[out, in]`` for a linear) and bias that compute the same without the
        piece, in their own dtypes: one rounding. Differentiable in the piece's parameters.

        Raises:
            ValueError: no weights do, and why.
        """

    def check_merge(self, bias: Tensor | None) -> None:
        """Raise what :meth:`merge` would on a module with this ``bias``: asked before anything of a model changes."""

    @abstractmethod
    def changes_anything(self) -> bool:
        """False while the module still computes what it did without the piece."""

    def tied(self, module: nn.Module, where: str) -> Piece:
        """What to put on ``module``, named ``where``, which shares its weight with this piece's: a ``Tied``.

        Raises:
            ValueError: this piece cannot act on both, so that a merge would change one of them by accident.
        """
        raise ValueError(
            f"{where} shares the weight that a {type(self).__name__} would change (tied weights): tuning one would "
            "tune both on merge; untie them, or name other modules"
        )

    # --- several of a kind ---

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Any]], where: str) -> Any:
        """A piece that changes as much as ``Σ weight·piece`` of ``parts``, all of this class; ``where``: its module.

        Raises:
            ValueError: pieces of this kind do not add up, or these do not.
        """
        raise ValueError(f"{where}: adapters with a {cls.__name__} do not add up; merge one and train the next on top")

    def structure(self) -> Any:
        """What, beside shapes, two pieces must share to take each other's tensors."""
        return None

    def check_swap(self, other: Piece, where: str) -> None:
        """ValueError unless the tensors of ``other`` fit into those of this piece."""
        mine = {key: tuple(tensor.shape) for key, tensor in self.tensors().items()}
        theirs = {key: tuple(tensor.shape) for key, tensor in other.tensors().items()}
        if type(self) is not type(other) or self.structure() != other.structure() or mine != theirs:
            raise ValueError(
                f"{where}: wanted a {type(self).__name__} with tensors {mine} to swap in, got a "
                f"{type(other).__name__} with {theirs}"
            )

    def take(self, other: Piece) -> None:
        """Take the tensors of ``other``, which :meth:`check_swap` found to fit, into this piece's own memory."""
        for attribute in self.stored.values():
            getattr(self, attribute).data.copy_(getattr(other, attribute))

    # --- files ---

    def tensors(self) -> dict[str, Tensor]:
        """What an adapter file stores of this piece, by key in the file."""
        return {key: self.to_file(key, getattr(self, a).detach()) for key, a in self.stored.items()}

    def to_file(self, key: str, tensor: Tensor) -> Tensor:
        """How a file holds what this piece holds as ``tensor``; as it is, unless other libraries have another form."""
        return tensor

    def from_file(self, key: str, tensor: Tensor) -> Tensor:
        """Inverse of :meth:`to_file`."""
        return tensor

    def load(self: _P, tensors: Mapping[str, Tensor], where: str) -> _P:
        """Take the values of an adapter file's ``tensors``; returns self.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape or not finite; the message starts with ``where``.
        """
        if set(tensors) != set(self.stored):
            got = sorted(tensors)
            raise ValueError(f"{where}: wanted tensors {sorted(self.stored)}, got {got}; the file is incomplete")
        for key, attribute in self.stored.items():
            held = getattr(self, attribute)
            wanted = self.to_file(key, held.detach()).shape
            if wanted != tensors[key].shape:
                raise ValueError(f"{where}.{key}: wanted shape {tuple(wanted)}, got {tuple(tensors[key].shape)}")
            if tensors[key].is_floating_point() and not torch.isfinite(tensors[key]).all():
                raise ValueError(f"{where}.{key} holds NaN or infinity; the file is corrupt: save the adapter again")
            held.data.copy_(self.from_file(key, tensors[key]))
        return self
