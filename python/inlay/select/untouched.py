"""Look at a model's gradients and leave no trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def untouched(model: nn.Module, training: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Within this context the parameters ``training`` require a gradient, none of which exists yet, and no other does.
    At its end every ``requires_grad``, ``grad`` and mode of ``model`` is as before."""
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    wanted = {id(parameter) for parameter in training}
    try:
        for parameter in flags:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        yield
    finally:
        for parameter, (requires_grad, grad) in flags.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, training_mode in modes.items():
            module.training = training_mode
