"""The empirical Fisher information of weights: per-sample squared gradients, in one pass per batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.linear import is_linear
from .trial import loss_of
from .untouched import untouched


def fisher_of_linears(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of each linear's weight: the mean over samples of ``‖∇ᵢ‖²``, the squared gradient of sample i's mean loss.

    A sample's weight gradient is ``G = dYᵀ·X`` over its tokens, and ``‖G‖² = Σ (dY·dYᵀ) ∘ (X·Xᵀ)`` over pairs of
    tokens: no gradient of the size of a weight is formed. The loss must be a mean over supervised tokens (or samples),
    as transformers' losses are; rows are samples. Weights, gradients and modes are as before when this returns.

    Raises:
        ValueError: there is no batch, or it carries no labels.
    """
    sums: dict[str, float] = {}
    seen = 0
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    with untouched(model):
        model.eval()
        for batch in batches:
            seen += _add_batch(model, linears, batch, sums)
    if not seen:
        raise ValueError("this choice wants calibration data, got none; pass tune(..., calibration=[{...}, ...])")
    return {name: total / seen for name, total in sums.items()}


def _add_batch(
    model: nn.Module, linears: Mapping[str, nn.Module], batch: Mapping[str, Any], sums: dict[str, float]
) -> int:
    shares = _shares(model, batch["labels"]) if isinstance(batch.get("labels"), Tensor) else None
    if shares is None:
        raise ValueError("this choice wants calibration batches with labels, got some without")
    grams: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0].detach()
        output = output.detach().requires_grad_(True) if not output.requires_grad else output

        def add(dy: Tensor) -> None:
            if x.dim() >= 2 and dy.dim() == x.dim() and x.shape[0] == shares.numel():
                grams[name] = grams.get(name, 0) + _squared_norms(x, dy)

        output.register_hook(add)
        return output

    with ExitStack() as stack:
        for name, module in linears.items():
            handle = module.register_forward_hook(lambda m, a, o, name=name: watch(name, m, a, o))
            stack.callback(handle.remove)
        with torch.enable_grad():
            loss_of(model, batch).backward()
    for name, squares in grams.items():
        sums[name] = sums.get(name, 0.0) + float((squares / shares.to(squares.device).square()).sum())
    return int((shares > 0).sum())


def _shares(model: nn.Module, labels: Tensor) -> Tensor:
    """What share each sample has of the batch's mean loss, ``[B]``; infinite for one without supervised tokens."""
    causal = labels.dim() > 1 and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    counted = labels[:, 1:] if causal else labels
    counts = (counted != -100).reshape(labels.shape[0], -1).sum(1).double()
    return torch.where(counts > 0, counts / counts.sum(), torch.inf)


def _squared_norms(x: Tensor, dy: Tensor) -> Tensor:
    """``‖dYᵢᵀ·Xᵢ‖²`` of each sample i, fp64 ``[B]``; x ``[B, ..., in]``, dy ``[B, ..., out]``."""
    x, dy = (t.reshape(t.shape[0], -1, t.shape[-1]).double() for t in (x, dy))
    return ((x @ x.transpose(1, 2)) * (dy @ dy.transpose(1, 2))).sum((1, 2))
