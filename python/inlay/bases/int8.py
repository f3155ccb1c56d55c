"""Int8 bases with one scale per row, the weights of LLM.int8 checkpoints.

Source: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022, arXiv:2208.07339.
Only the storage is theirs: activations are not quantized here, weights are dequantized for each product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..ops.base_products import DenseBase
from ..ops.quantize_blockwise import dequantize_int8, quantize_int8
from .quantized import STORAGES, Storage, naming


@dataclass(frozen=True)
class Int8(Storage):
    """``W[n, k] = code · (absmax[n] / 127)``; codes int8, absmax fp32 (bitsandbytes' ``weight`` and ``SCB``)."""

    names: ClassVar[tuple[str, ...]] = ("codes", "absmax")

    def quantize(self, weight: Tensor, where: str) -> tuple[Tensor | None, ...]:
        with naming(where):
            return quantize_int8(weight)

    def forward(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        *storage, bias = tensors
        bias = bias if bias is None else bias.to(x.dtype)
        return functional.linear(x, self.dequantize(x.dtype, *storage, None), bias)

    def backward_input(self, dy: Tensor, *tensors: Tensor | None) -> Tensor:
        return dy.matmul(self.dequantize(dy.dtype, *tensors))

    def forward_plus(self, x: Tensor, left: Tensor, right: Tensor, *tensors: Tensor | None) -> Tensor:
        *storage, bias = tensors
        dense = self.dequantize(x.dtype, *storage, None)
        return DenseBase.forward_plus(x, left, right, dense, bias if bias is None else bias.to(x.dtype))

    def backward_input_plus(self, dy: Tensor, left: Tensor, right: Tensor, *tensors: Tensor | None) -> Tensor:
        return DenseBase.backward_input_plus(dy, left, right, self.dequantize(dy.dtype, *tensors))

    def dequantize(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        codes, absmax, _ = tensors
        return dequantize_int8(codes, absmax, dtype)

    def zero_(self, dim: int, indices: Tensor, *tensors: Tensor | None) -> None:
        assert tensors[0] is not None
        tensors[0].data.index_fill_(dim, indices, 0)

    def write_(self, dim: int, indices: Tensor, values: Tensor, *tensors: Tensor | None) -> None:
        codes, absmax, _ = tensors
        assert codes is not None and absmax is not None
        scales = absmax[:, None] / 127 if dim == 1 else absmax.index_select(0, indices)[:, None] / 127
        found = (values / torch.where(scales == 0, 1.0, scales)).round().clamp(-127, 127).to(torch.int8)
        codes.data.index_copy_(dim, indices, found)


STORAGES["int8"] = Int8, {}
