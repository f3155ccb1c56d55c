"""A linear adapter behind a linear: ``y + s·U·D·y``, dropped for whole samples in training, smaller in use.

Source: Kim, Jeong, Kim, Kwak, "Efficient and Versatile Robust Fine-Tuning of Zero-shot Models", ECCV 2024,
arXiv:2408.05749 (R-Adapter), and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...roles import widths
from ...sharding import whole
from .base import LinearPiece, like_of


class OutputAdapter(LinearPiece):
    """``D`` fp32 ``[r, out]`` from Xavier-uniform values, ``U`` ``[out, r]`` from 0, ``s`` ``[1]`` from 0.1.

    In use, and merged, s is ``eval_scale`` times as large. Weight and bias are merged by going through the adapter: no
    bias is needed.

    Args:
        module: a linear of any storage. r: rank.
        drop_path: probability with which the adapter is left out for a sample (the first dimension) in training.
        generator: where D is drawn from.
    """

    stored = {name: name for name in ("r_adapter_down", "r_adapter_up", "r_adapter_scale")}
    #: What is stored beside: the running averages, by what they are averages of.
    averages: dict[str, str] = {}

    def __init__(
        self,
        module: nn.Module,
        r: int,
        drop_path: float = 0.0,
        eval_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(*widths(module))
        self.drop_path, self.eval_scale = drop_path, eval_scale
        self.draws_by_sample = drop_path > 0
        self.base_bias = getattr(module, "bias", None) is not None
        self.make(like_of(module), r, generator)
        self.r_adapter_scale = nn.Parameter(self.r_adapter_up.detach().new_full((1,), 0.1))
        for name, average in self.averages.items():
            self.register_buffer(average, getattr(self, name).detach().clone())

    def make(self, like: Tensor, r: int, generator: torch.Generator | None) -> None:
        """Register the matrices, with the dtype and device of ``like``."""
        bound = math.sqrt(6 / (self.out_features + r))
        drawn = torch.rand(r, self.out_features, generator=generator) * (2 * bound) - bound
        self.r_adapter_down = nn.Parameter(drawn.to(like.device, like.dtype))
        self.r_adapter_up = nn.Parameter(like.new_zeros(self.out_features, r))

    def held(self, name: str, training: bool) -> Tensor:
        """The tensor that a forward reads: in use the average, where there is one."""
        return getattr(self, name if training else self.averages.get(name, name))

    def down(self, y: Tensor, training: bool) -> Tensor:
        """``D·y`` for ``y [..., out]``, in its dtype."""
        return functional.linear(y, self.held("r_adapter_down", training).to(y.device, y.dtype))

    def scaled_up(self, training: bool) -> Tensor:
        """``s·U``, fp32."""
        scale = self.held("r_adapter_scale", training) * (1.0 if training else self.eval_scale)
        return scale * self.held("r_adapter_up", training)

    def after(self, y: Tensor, x: Any) -> Tensor:
        change = functional.linear(self.down(y, self.training), self.scaled_up(self.training).to(y.dtype))
        if self.training and self.drop_path > 0:
            kept = 1 - self.drop_path
            shape = (y.shape[0], *[1] * (y.dim() - 1))
            change = change * (torch.empty(shape, dtype=y.dtype, device=y.device).bernoulli_(kept) / kept)
        return y + change

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What it computes in use, whatever the mode."""
        up = self.scaled_up(False).to(weight.device)
        return self._changed(weight, up), None if bias is None else self._changed(bias, up)

    def _changed(self, tensor: Tensor, up: Tensor) -> Tensor:
        """A copy of ``tensor [out, ...]`` behind the adapter, rounded once."""
        # a copy: products of memory that a file is mapped to, which begins anywhere, may sum in another order
        columns = tensor.to(up.dtype, copy=True).reshape(self.out_features, -1)
        changed = columns + up @ self.down(columns.t(), False).t()
        return changed.view(tensor.shape).to(tensor.dtype)

    def average(self, decay: float) -> None:
        """Move the averages towards the values: ``decay·average + (1 - decay)·value``."""
        for name, average in self.averages.items():
            getattr(self, average).lerp_(whole(getattr(self, name).detach()), 1 - decay)

    def lora_factors(self, weight: Callable[[], Tensor] | None = None) -> tuple[Tensor, Tensor] | None:
        """``D·W`` and ``s·U`` as in use; none where the module has a bias, which goes through the adapter too."""
        if self.base_bias or weight is None:
            return None
        up = self.scaled_up(False).detach()
        return self.down(weight().to(up.dtype).t(), False).t().detach().contiguous(), up

    def structure(self) -> Any:
        return self.eval_scale

    def changes_anything(self) -> bool:
        return bool(self.r_adapter_up.detach().any())

    def extra_repr(self) -> str:
        return f"r={self.r_adapter_up.shape[1]}, drop_path={self.drop_path}, eval_scale={self.eval_scale}"


class FullOutputAdapter(OutputAdapter):
    """The same with one matrix, ``U`` ``[out, out]``: what the authors use where r is not below the width."""

    stored = {name: name for name in ("r_adapter_up", "r_adapter_scale")}

    def make(self, like: Tensor, r: int, generator: torch.Generator | None) -> None:
        self.r_adapter_up = nn.Parameter(like.new_zeros(self.out_features, self.out_features))

    def down(self, y: Tensor, training: bool) -> Tensor:
        return y


class AveragedOutputAdapter(OutputAdapter):
    """The same with a running average of every tensor, which is what is used outside training."""

    averages = {name: f"{name}_average" for name in OutputAdapter.stored}
    stored = {**OutputAdapter.stored, **{name: name for name in averages.values()}}

    def changes_anything(self) -> bool:
        return super().changes_anything() or bool(self.r_adapter_up_average.any())


class AveragedFullOutputAdapter(FullOutputAdapter):
    """One matrix, with averages."""

    averages = {name: f"{name}_average" for name in FullOutputAdapter.stored}
    stored = {**FullOutputAdapter.stored, **{name: name for name in averages.values()}}

    def changes_anything(self) -> bool:
        return super().changes_anything() or bool(self.r_adapter_up_average.any())
