"""Trials: train some weights for a few steps to see what it does, and put everything back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import AdamW
from .untouched import untouched

#: Batches of keyword arguments for the model's forward, with labels.
Batches = Sequence[Mapping[str, Any]]


@contextmanager
def trial(model: nn.Module, keys: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Within this context the parameters ``keys`` train, and no other; what they became is undone at its end.

    Also put back: buffers, every ``requires_grad`` and ``grad``, modes, and the state of the random number generators.
    """
    chosen = {key: model.get_parameter(key) for key in keys}
    held: list[tuple[Tensor, Tensor]] = [(t.detach(), t.detach().clone()) for t in (*chosen.values(), *model.buffers())]
    try:
        with untouched(model, chosen.values()), torch.random.fork_rng(devices=[]):
            yield chosen
    finally:
        with torch.no_grad():
            for tensor, value in held:
                tensor.copy_(value)


def train_some(
    model: nn.Module, parameters: Iterable[nn.Parameter], batches: Batches, steps: int, lr: float, seed: int = 0
) -> None:
    """``steps`` steps of AdamW on ``batches``, again and again, in training mode.

    A parameter steps, and its gradient is freed, as soon as a backward has all of it: no two gradients exist at once.

    Raises:
        ValueError: there is no batch, or the model returns no loss.
    """
    if not batches:
        raise ValueError("this choice wants calibration data, got none; pass tune(..., calibration=[{...}, ...])")
    model.train()
    torch.manual_seed(seed)
    with ExitStack() as stack:
        for parameter in parameters:
            optimizer = AdamW([parameter], lr=lr, weight_decay=0.0, rounding="residual")
            stack.callback(parameter.register_post_accumulate_grad_hook(partial(_step, optimizer)).remove)
        for batch in islice(cycle(batches), steps):
            loss_of(model, batch).backward()


def _step(optimizer: AdamW, parameter: Tensor) -> None:
    optimizer.step()
    parameter.grad = None


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's loss on ``batch``, moved to its device; ValueError if it returns none."""
    device = next(model.parameters()).device
    out = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    loss = getattr(out, "loss", None)
    if loss is None:
        raise ValueError("this choice wants calibration batches with labels; the model returned no loss")
    return loss


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Batches) -> float:
    """The mean of the losses on ``batches``, in eval mode."""
    model.eval()
    return sum(float(loss_of(model, batch)) for batch in batches) / len(batches)
