"""Selection by activation size on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.modes import evaluating


def run_batches(model: nn.Module, batches: Iterable[Mapping[str, Any]], loss: bool = False) -> int:
    """Run ``model(**batch)`` on every batch in eval mode, with a backward if ``loss``. Returns how many ran.

    Raises:
        ValueError: there is no batch, or ``loss`` is wanted and the model returns none.
    """
    device = next(model.parameters()).device
    ran = 0
    with evaluating(model), torch.set_grad_enabled(loss):
        for batch in batches:
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            out = model(**moved)
            ran += 1
            if loss:
                value = getattr(out, "loss", None)
                if value is None:
                    raise ValueError('strategy="gradient" wants calibration batches with labels; the loss is None')
                value.backward()
    if ran == 0:
        raise ValueError("this strategy wants calibration data, got none; pass tune(..., calibration=[{...}, ...])")
    return ran


def activation_scores(
    model: nn.Module, sides: Mapping[str, str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Mean ``|x_c|`` per input channel (side "in") or ``|y_c|`` per output channel of each named linear, fp32.

    Positions that a batch's ``attention_mask [B, T]`` hides do not count.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    mask: Tensor | None = None

    def remembering() -> Iterator[Mapping[str, Any]]:
        nonlocal mask
        for batch in batches:
            mask = batch.get("attention_mask")
            yield batch

    def add(name: str, value: Tensor) -> None:
        value = value.detach()
        if mask is not None and mask.shape == value.shape[:-1]:
            value = value[mask.to(value.device).bool()]
        flat = value.reshape(-1, value.shape[-1]).float().abs()
        sums[name] = sums.get(name, torch.zeros(flat.shape[1], device=flat.device)) + flat.sum(dim=0)
        rows[name] = rows.get(name, 0) + flat.shape[0]

    def hook(name: str, side: str):
        if side == "in":
            return lambda module, args, out: add(name, args[0])
        return lambda module, args, out: add(name, out)

    with ExitStack() as stack:
        for name, side in sides.items():
            handle = model.get_submodule(name).register_forward_hook(hook(name, side))
            stack.callback(handle.remove)
        run_batches(model, remembering())
    missing = [name for name in sides if name not in sums]
    if missing:
        raise ValueError(f"calibration never ran {missing[:3]}; use batches that reach them or exclude these modules")
    return {name: sums[name] / max(rows[name], 1) for name in sides}
