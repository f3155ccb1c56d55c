"""Quantized bases: frozen Parameters of their true dtype, in bitsandbytes' storage.

A *storage* is a frozen dataclass that knows shape and format and does the products (see ``bases.linear``); a
:class:`QuantizedLinear` holds the tensors. Packed codes are uint8 Parameters and scales fp32 Parameters: never
reinterpreted as other dtypes, sharded by FSDP2, left alone by ``.half()`` and ``.to(dtype)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .linear import base_linear, is_conv1d, out_in_view


@dataclass(frozen=True)
class Storage(ABC):
    """What a quantized weight ``[rows, columns]`` is stored as, and the products with it.

    Subclasses define ``names`` (the tensors, in the order the products take them, before the bias) and every abstract
    method; without one they cannot be made.
    """

    names: ClassVar[tuple[str, ...]] = ()

    rows: int
    columns: int

    @classmethod
    def options_from(cls, config: Any) -> dict[str, Any]:
        """The options of a ``BaseConfig`` that this storage has."""
        return {}

    @abstractmethod
    def quantize(self, weight: Tensor, where: str) -> tuple[Tensor | None, ...]:
        """The tensors of ``weight [rows, columns]``; ValueError naming ``where`` if it holds NaN or infinity."""

    @abstractmethod
    def forward(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        """``x·Wᵀ + bias``, ``[..., columns]`` to ``[..., rows]``."""

    @abstractmethod
    def backward_input(self, dy: Tensor, *tensors: Tensor | None) -> Tensor:
        """``dy·W``, ``[..., rows]`` to ``[..., columns]``."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        """Dense ``[rows, columns]``."""

    @abstractmethod
    def zero_(self, dim: int, indices: Tensor, *tensors: Tensor | None) -> None:
        """Make the chosen rows (dim 0) or columns (dim 1) exactly 0, in place, leaving all other codes as they are."""

    @abstractmethod
    def write_(self, dim: int, indices: Tensor, values: Tensor, *tensors: Tensor | None) -> None:
        """Undo :meth:`zero_`: write ``values``, as they were dequantized, into the chosen rows or columns."""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Errors of the ops inside say which weight they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None


class DenseCopy(Tensor):
    """A packed weight's values. Reading is all it is for: what is written to ``.data`` would be lost with the copy.

    PEFT's stock layers do just that when they merge into a linear they take for a dense one.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # what is computed from it is an ordinary tensor

    @property
    def data(self) -> Tensor:
        return self.detach().as_subclass(Tensor)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise TypeError(
            "this weight is stored quantized and .weight is a copy of it: nothing can be merged into it. With PEFT, "
            "wrap the config in inlay.integrations.peft.accelerate_lora before get_peft_model; or use inlay.tune and "
            "inlay.merge"
        )


# To a type checker this mixin is the module it is mixed into.
if TYPE_CHECKING:
    from torch.nn import Module as _Module
else:
    _Module = object


class QuantizedWeight(_Module):
    """What modules with a quantized weight share: ``weight`` answers with dense values, ``.half()`` keeps the bytes."""

    storage: Storage
    compute_dtype: torch.dtype
    conv1d: bool = False

    def hold(
        self, storage: Storage, tensors: tuple[Tensor | None, ...], bias: Tensor | None, compute_dtype: torch.dtype
    ) -> None:
        """Register ``tensors`` (as ``storage.quantize`` returns them) and ``bias`` as frozen Parameters."""
        self.storage, self.compute_dtype = storage, compute_dtype
        self.out_features, self.in_features = storage.rows, storage.columns
        for name, tensor in zip((*storage.names, "bias"), (*tensors, bias), strict=True):
            if tensor is not None and tensor.dim() == 0:
                tensor = tensor.reshape(1)  # FSDP2 takes no scalars
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, tensor)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Storage tensors and bias, as the products take them."""
        held = self._parameters  # nn.Module's own lookup takes 0.4 us a tensor, in every linear of every token
        return (*[held[name] for name in self.storage.names], held["bias"])

    @property
    def weight(self) -> Tensor:
        """The dense weight ``[out, in]`` in ``compute_dtype``, made anew at each access."""
        return self.dense_base(self.compute_dtype).as_subclass(DenseCopy)

    def dense_base(self, dtype: torch.dtype) -> Tensor:
        """:attr:`weight` in another dtype, an ordinary tensor."""
        return self.storage.dequantize(dtype, *self.tensors)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"this weight is stored quantized ({self.storage}) and cannot be assigned or trained; train an adapter "
                "on it, or load the dense model"
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move storage between devices, but keep its dtypes."""
        storage = [tensor for name in self.storage.names if (tensor := self._parameters[name]) is not None]
        self.compute_dtype = fn(torch.zeros(0, dtype=self.compute_dtype)).dtype

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            kept = moved.dtype != tensor.dtype and any(tensor is held for held in storage)
            return tensor.to(moved.device) if kept else moved

        return super()._apply(move, recurse)


def dense_linear(weight: Tensor, bias: Tensor | None, conv1d: bool) -> nn.Module:
    """A frozen ``nn.Linear``, or a transformers Conv1D, with ``weight [out, in]`` and ``bias``."""
    rows, columns = weight.shape
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            dense = Conv1D(rows, columns)
        weight = weight.t().contiguous()
    else:
        dense = nn.Linear(columns, rows, bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    kept = bias is None or isinstance(bias, nn.Parameter)
    dense.bias = bias if kept else nn.Parameter(bias, requires_grad=False)
    return dense


class QuantizedLinear(QuantizedWeight, nn.Linear):
    """A frozen linear whose weight is stored quantized; an ``nn.Linear``, so that "all-linear" finds it.

    Args:
        storage: format and shape. tensors: what ``storage.quantize`` returns. bias: ``[out]`` or None.
        compute_dtype: dtype of ``weight`` as seen from outside; products run in the dtype of their input.
        conv1d: whether it stands for a transformers Conv1D, which is what it turns back into.
    """

    inlay_linear = True  # see bases.linear.computes_linear

    def __init__(
        self,
        storage: Storage,
        tensors: tuple[Tensor | None, ...],
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        conv1d: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: there is no dense weight to make
        self.hold(storage, tensors, bias, compute_dtype)
        self.conv1d = conv1d

    @classmethod
    def of(cls, module: nn.Module, storage: Storage, where: str) -> QuantizedLinear:
        """Quantize a dense ``nn.Linear`` or Conv1D; ``where`` names it in errors."""
        weight = out_in_view(module)
        tensors = storage.quantize(weight, where)
        quantized = cls(storage, tensors, module.bias, weight.dtype, is_conv1d(module))
        return quantized.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        return base_linear(x, self.storage, *self.tensors)

    def to_dense(self, weight: Tensor | None = None) -> nn.Module:
        """The ``nn.Linear`` or Conv1D this stands for, with ``weight [out, in]`` or the dequantized one."""
        weight = weight if weight is not None else self.dense_base(self.compute_dtype)
        return dense_linear(weight, self.bias, self.conv1d).train(self.training)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}, {self.storage}"


#: Storage classes by the name ``tune(base=...)`` takes; each file in this package adds its own.
STORAGES: dict[str, tuple[type[Storage], dict[str, Any]]] = {}
