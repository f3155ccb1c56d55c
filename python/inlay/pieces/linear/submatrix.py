"""The submatrix delta of S²FT: chosen input channels ``ΔW[:, I]`` or output channels ``ΔW[O, :]``.

Source: Yang et al., "S²FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...bases.quantized import Storage
from ...ops import submatrix_add_delta, submatrix_linear, submatrix_linear_in_place, submatrix_write_
from ...ops.swiglu import swiglu_submatrix_linear
from .base import Delta

Side = Literal["in", "out"]


def check_indices(indices: Tensor, channels: int, where: str) -> Tensor:
    """``indices`` as sorted int64 ``[s]``; raises ValueError on an empty, repeated or out-of-range channel."""
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{where}: wanted whole channel numbers, got {indices.dtype}")
    indices = indices.to(torch.int64).reshape(-1)
    if indices.numel() == 0:
        raise ValueError(f"{where}: wanted at least one channel, got none; raise `ratio` or `channels`")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= channels:
        raise ValueError(f"{where}: wanted channels in [0, {channels}), got {low}..{high}")
    unique = torch.unique(indices, sorted=True)
    if unique.numel() != indices.numel():
        raise ValueError(f"{where}: wanted distinct channels, got {indices.numel() - unique.numel()} repeated")
    return unique


class SubmatrixDelta(Delta):
    """Additive submatrix: ``y = round(float(base(x)) + float(x[..., I])·Vᵀ)``, V fp32 from zero.

    Args:
        weight: the base weight, viewed as ``[out, in]``; only its shape, device and width of dtype are used.
        indices: the trained channels, int64 ``[s]``, any order, distinct.
        side: ``"in"`` trains ``ΔW[:, I]`` (values ``[out, s]``), ``"out"`` trains ``ΔW[O, :]`` (values ``[s, in]``).

    Weight decay on ``values`` pulls towards the base weights.
    """

    stored = {"s2ft_values": "s2ft_values", "s2ft_indices": "s2ft_indices"}

    def __init__(self, weight: Tensor, indices: Tensor, side: Side = "in", where: str = "submatrix") -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features)
        if side not in ("in", "out"):
            raise ValueError(f'{where}: wanted side "in" or "out", got {side!r}')
        self.side: Side = side
        indices = check_indices(indices, in_features if side == "in" else out_features, where)
        shape = (out_features, indices.numel()) if side == "in" else (indices.numel(), in_features)
        dtype = torch.promote_types(weight.dtype, torch.float32)  # fp32, but fp64 on an fp64 base
        self.s2ft_values = nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))
        self.register_buffer("s2ft_indices", indices.to(weight.device))

    @property
    def dim(self) -> int:
        """The dimension of ``[out, in]`` that the indices choose from."""
        return 1 if self.side == "in" else 0

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return submatrix_add_delta(y, x, self.s2ft_values, self.s2ft_indices, self.side)

    def linear(self, x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
        return submatrix_linear(x, self.s2ft_values, self.s2ft_indices, self.side, base, *tensors)

    def gated_linear(self, gate: Tensor, up: Tensor, act: str, base: Any, *tensors: Tensor | None) -> Tensor:
        if self.side == "out":  # needs all of its input
            return super().gated_linear(gate, up, act, base, *tensors)
        return swiglu_submatrix_linear(
            gate, up, act, self.s2ft_values, self.s2ft_indices, base, *tensors, in_place=self.in_place
        )

    def weight_delta(self) -> Tensor:
        delta = self.s2ft_values.new_zeros(self.out_features, self.in_features)
        return delta.index_copy(self.dim, self.s2ft_indices, self.change())

    def change(self) -> Tensor:
        """ΔW at the trained channels, fp32, in the shape of ``values``."""
        return self.s2ft_values

    def changes_anything(self) -> bool:
        return bool(self.change().detach().any())

    def _with_values(self, weight: Tensor) -> Tensor:
        """A copy of ``weight [out, in]`` with the values at the trained channels."""
        return weight.index_copy(self.dim, self.s2ft_indices.to(weight.device), self.s2ft_values.to(weight))

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Delta]], where: str) -> Delta:
        """The union of the channels."""
        deltas = [delta for _, delta in parts]
        if cls.owns_base or any(type(delta) is not SubmatrixDelta for delta in deltas):
            return super().combine(parts, where)
        first: Any = deltas[0]
        if len({delta.side for delta in deltas}) > 1:
            raise ValueError(
                f"{where}: one adapter trains input channels and another output channels; they cannot add up"
            )
        union = torch.cat([delta.s2ft_indices for delta in deltas]).unique(sorted=True)
        like = first.s2ft_values.new_empty(1).expand(first.out_features, first.in_features)
        made = SubmatrixDelta(like, union, first.side, where)
        with torch.no_grad():
            for weight, delta in parts:
                places = torch.searchsorted(union, delta.s2ft_indices)
                made.s2ft_values.index_add_(made.dim, places, delta.s2ft_values.detach(), alpha=weight)
        return made

    def structure(self) -> Any:
        return self.side

    def load(self, tensors: Mapping[str, Tensor], where: str) -> Delta:
        super().load(tensors, where)
        order = self.s2ft_indices.argsort()  # another writer may not have sorted them
        for attribute in self.stored.values():
            held = getattr(self, attribute)
            held.data.copy_(held.data.index_select(self.dim if held.dim() == 2 else 0, order))
        return self

    def lora_factors(self, weight: Callable[[], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One-hot on the chosen side, values on the other: ``B·A`` has one product per entry, so it is exact."""
        count = self.s2ft_indices.numel()
        channels = self.in_features if self.side == "in" else self.out_features
        one_hot = self.s2ft_values.new_zeros(count, channels)
        one_hot[torch.arange(count, device=one_hot.device), self.s2ft_indices] = 1.0
        change = self.change().detach().clone()
        return (one_hot, change) if self.side == "in" else (change, one_hot.t().contiguous())

    def extra_repr(self) -> str:
        return f"side={self.side}, channels={self.s2ft_indices.numel()}"


class InPlaceSubmatrixDelta(SubmatrixDelta):
    """The paper's form for dense bases: ``values`` (fp32) hold what the chosen channels of W *are*.

    They are written into W, rounded once, at the start of every forward, since optimizers do not reliably tell
    when they changed a parameter. The channels' original values stay in ``original`` for ``disabled``, ΔW and export.
    Weight decay on ``values`` pulls towards zero.
    """

    in_place = True
    owns_base = True
    stored = {**SubmatrixDelta.stored, "s2ft_original": "s2ft_original"}

    def __init__(self, weight: Tensor, indices: Tensor, side: Side = "in", where: str = "submatrix") -> None:
        super().__init__(weight, indices, side, where)
        original = weight.detach().index_select(self.dim, self.s2ft_indices).clone()
        self.register_buffer("s2ft_original", original)
        with torch.no_grad():
            self.s2ft_values.copy_(original)

    def linear(self, x: Tensor, base: Any, *tensors: Tensor | None) -> Tensor:
        return submatrix_linear_in_place(x, self.s2ft_values, self.s2ft_indices, self.side, base, *tensors)

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        raise RuntimeError("an in-place submatrix is part of its base weight; it cannot be added to another adapter")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """The original values are part of the base: they go where it goes."""
        original: Tensor = self._buffers["s2ft_original"]
        super()._apply(fn, recurse)
        self.s2ft_original = fn(original)
        return self

    def write(self, weight: Tensor) -> None:
        """Write the current values into ``weight [out, in]``."""
        submatrix_write_(weight, self.s2ft_indices, self.s2ft_values.detach(), self.dim)

    def restore(self, weight: Tensor) -> None:
        """Write the original values back into ``weight [out, in]``."""
        submatrix_write_(weight, self.s2ft_indices, self.s2ft_original.to(self.s2ft_values.dtype), self.dim)

    def change(self) -> Tensor:
        return self.s2ft_values - self.s2ft_original.to(self.s2ft_values.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._with_values(weight), bias


class ExactSubmatrixDelta(SubmatrixDelta):
    """Chosen channels of a quantized base kept in high precision: zero in the packed weight, ``values`` instead.

    ``values`` (fp32) start as the channels' dense weights where those were at hand, so that tuning also removes their
    quantization error. Other codes and all scales stay as they were: the adapter fits any copy of the same base.
    """

    owns_base = True
    needs_quantized_base = True
    stored = {**SubmatrixDelta.stored, "s2ft_original": "s2ft_original"}

    def __init__(self, weight: Tensor, indices: Tensor, side: Side = "in", where: str = "submatrix") -> None:
        """``weight``: the dense weight ``[out, in]`` before quantization, or the dequantized one."""
        super().__init__(weight, indices, side, where)
        original = weight.detach().index_select(self.dim, self.s2ft_indices).to(self.s2ft_values.dtype)
        self.register_buffer("s2ft_original", original)
        with torch.no_grad():
            self.s2ft_values.copy_(original)

    def prepare_base(self, storage: Storage, *tensors: Tensor | None) -> None:
        """Keep what a disabled adapter answers with, then zero the channels."""
        held = storage.dequantize(self.s2ft_values.dtype, *tensors).index_select(self.dim, self.s2ft_indices)
        self.register_buffer("s2ft_packed", held, persistent=False)
        storage.zero_(self.dim, self.s2ft_indices, *tensors)

    def release_base(self, storage: Storage, *tensors: Tensor | None) -> None:
        storage.write_(self.dim, self.s2ft_indices, self.s2ft_packed, *tensors)

    def put_back(self, weight: Tensor) -> None:
        weight.index_copy_(self.dim, self.s2ft_indices, self.s2ft_packed.to(weight.dtype))

    def add_original(self, y: Tensor, x: Tensor) -> Tensor:
        return submatrix_add_delta(y, x, self.s2ft_packed, self.s2ft_indices, self.side)

    def change(self) -> Tensor:
        return self.s2ft_values - self.s2ft_original

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._with_values(weight), bias
