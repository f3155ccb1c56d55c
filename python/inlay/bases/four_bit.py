"""NF4 and FP4 bases in bitsandbytes' storage, with and without double quantization.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import base_products
from ..ops._registry import as_rows
from ..ops.matmul_sum import packs
from ..ops.quantize_blockwise import (
    QUANT_TYPES,
    check_blocksize,
    check_packed,
    dequantize_4bit,
    dequantize_absmax,
    levels,
    quantize_4bit,
    quantize_absmax,
)
from ..ops.quantized_linear import (
    PANEL_BYTES,
    decodes_in_registers,
    lora_branch_fits,
    quantized_linear,
    quantized_linear_backward_input,
    quantized_lora_linear_small,
)
from ..ops.quantized_stack import PackedStack, stack_backward_input, stack_forward
from .quantized import STORAGES, Storage, naming


@dataclass(frozen=True)
class FourBit(Storage):
    """Four bits a weight in blocks, and a scale per block.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: weights per scale, in row-major order, blocks straddling rows.
        double_quant: store the scales themselves in 8 bits (0.516 instead of 0.5625 bytes a weight at blocksize 64).
    """

    names: ClassVar[tuple[str, ...]] = ("packed", "absmax", "absmax_codes", "absmax_offset")

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        check_blocksize("FourBit", self.blocksize)
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type: wanted one of {QUANT_TYPES}, got {self.quant_type!r}")

    @classmethod
    def options_from(cls, config: Any) -> dict[str, Any]:
        return {"blocksize": config.blocksize, "double_quant": config.double_quant}

    def quantize(self, weight: Tensor, where: str) -> tuple[Tensor | None, ...]:
        with naming(where):
            packed, absmax = quantize_4bit(weight, self.quant_type, self.blocksize)
        if not self.double_quant:
            return packed, absmax, None, None
        codes, absmax2, offset = quantize_absmax(absmax)
        return packed, absmax2, codes, offset

    def check(self, packed: Tensor, absmax: Tensor, codes: Tensor | None, offset: Tensor | None) -> None:
        """ValueError if these tensors cannot be this storage's."""
        check_packed("FourBit", packed, absmax, codes, offset, self.blocksize, self.rows, self.columns)

    def forward(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        packed, absmax, codes, offset, bias = tensors
        return quantized_linear(x, packed, absmax, codes, offset, bias, self.quant_type, self.blocksize, self.rows)

    def forward_lora(self, x: Tensor, a: Tensor, b: Tensor, scale: float, *tensors: Tensor | None) -> Tensor | None:
        """forward(x) + scale·(x·Aᵀ)·Bᵀ with one rounding, where that is one op; None elsewhere."""
        if not lora_branch_fits(x, self.blocksize):
            return None
        factors = (a, b, scale, self.quant_type, self.blocksize, self.rows)
        return quantized_lora_linear_small(as_rows(x), *tensors, *factors).view(*x.shape[:-1], self.rows)

    def _at_once(self, x: Tensor) -> bool:
        """True where a narrow product runs with the whole weight, which CPUs dequantize in parts of PANEL_BYTES."""
        one_part = self.rows * self.columns * x.element_size() <= PANEL_BYTES
        return self.columns > 1 and (base_products.wide_sums(x) or (one_part and packs(x)))

    def forward_plus(self, x: Tensor, left: Tensor, right: Tensor, *tensors: Tensor | None) -> Tensor:
        if decodes_in_registers(x, self.blocksize) or not self._at_once(x):
            return base_products.add_narrow(self.forward(x, *tensors), left, right.t())
        return FourBitStack((self,)).forward(x, [tensors], left, right)[0]

    def backward_input_plus(self, dy: Tensor, left: Tensor, right: Tensor, *tensors: Tensor | None) -> Tensor:
        if not self._at_once(dy):
            return base_products.add_narrow(self.backward_input(dy, *tensors), left, right)
        return FourBitStack((self,)).backward_input([dy], [tensors], left, right)

    @staticmethod
    def stack_of(bases: Sequence[Any], x: Tensor) -> FourBitStack | None:
        """These bases as one product for ``x``, or None where they differ in more than their rows, or decode."""
        first = bases[0]
        if decodes_in_registers(x, first.blocksize) or first.columns < 2:
            return None
        return FourBitStack(tuple(bases)) if FourBit.alike(bases) else None

    @staticmethod
    def alike(bases: Sequence[Any]) -> bool:
        """True for four-bit weights that differ in nothing but their rows: they can be dequantized below each other."""
        formats = {(b.columns, b.quant_type, b.blocksize, b.double_quant) for b in bases if isinstance(b, FourBit)}
        return len(formats) == 1 and all(isinstance(base, FourBit) for base in bases)

    def backward_input(self, dy: Tensor, *tensors: Tensor | None) -> Tensor:
        packed, absmax, codes, offset, _ = tensors
        return quantized_linear_backward_input(
            dy, packed, absmax, codes, offset, self.quant_type, self.blocksize, self.columns
        )

    def add_backward_input(self, dx: Tensor, dy: Tensor, *tensors: Tensor | None) -> None:
        packed, absmax, codes, offset, _ = tensors
        quantized_linear_backward_input(
            dy, packed, absmax, codes, offset, self.quant_type, self.blocksize, self.columns, onto=dx
        )

    def dequantize(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        packed, absmax, codes, offset, _ = tensors
        return dequantize_4bit(
            packed, absmax, self.quant_type, self.blocksize, self.rows, self.columns, dtype, codes, offset
        )

    def zero_(self, dim: int, indices: Tensor, *tensors: Tensor | None) -> None:
        assert tensors[0] is not None
        packed = tensors[0].data
        codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)
        weights = codes[: self.rows * self.columns].view(self.rows, self.columns)
        weights.index_fill_(dim, indices, int(levels(self.quant_type).abs().argmin()))
        packed.copy_(codes[::2] << 4 | codes[1::2])

    def write_(self, dim: int, indices: Tensor, values: Tensor, *tensors: Tensor | None) -> None:
        packed, absmax, nested, offset, _ = tensors
        assert packed is not None and absmax is not None
        scales = absmax if nested is None or offset is None else dequantize_absmax(nested, absmax, offset)
        scales = torch.where(scales == 0, 1.0, scales)  # of a block of zeros
        place = torch.arange(self.rows * self.columns, device=packed.device).view(self.rows, self.columns)
        place = place.index_select(dim, indices)
        unit = values / scales[place // self.blocksize]
        found = (unit[..., None] - levels(self.quant_type).to(unit.device)).abs().argmin(dim=-1).to(torch.uint8)
        codes = torch.stack((packed.data >> 4, packed.data & 15), dim=1).reshape(-1)
        codes[place.reshape(-1)] = found.reshape(-1)
        packed.data.copy_(codes[::2] << 4 | codes[1::2])


@dataclass(frozen=True)
class FourBitStack:
    """Four-bit linears of one input as one product for many rows: ``inlay.ops.base_products.Stack``."""

    bases: tuple[FourBit, ...]

    def _weights(self, tensors: Sequence[tuple]) -> PackedStack:
        packed, absmaxes, codes, offsets = (list(column) for column in zip(*(t[:4] for t in tensors), strict=True))
        if not self.bases[0].double_quant:
            codes, offsets = [], []
        first, rows = self.bases[0], [base.rows for base in self.bases]
        return PackedStack(packed, absmaxes, codes, offsets, rows, first.columns, first.quant_type, first.blocksize)

    def forward(
        self,
        x: Tensor,
        tensors: Sequence[tuple],
        left: Tensor | None = None,
        right: Tensor | None = None,
        apart: bool = False,
    ) -> list[Tensor]:
        """``base_i(x) + left·right_iᵀ``, ``left [M, r]``, ``right [Σout, r]``."""
        return stack_forward(x, self._weights(tensors), [t[4] for t in tensors], left, right, apart)

    def backward_input(
        self,
        dys: Sequence[Tensor],
        tensors: Sequence[tuple],
        left: Tensor | None = None,
        right: Tensor | None = None,
    ) -> Tensor:
        """``Σ dy_i·W_i + left·right``, ``right [r, in]``."""
        return stack_backward_input(dys, self._weights(tensors), left, right)


STORAGES["nf4"] = FourBit, {"quant_type": "nf4"}
STORAGES["fp4"] = FourBit, {"quant_type": "fp4"}
