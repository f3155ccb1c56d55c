"""Modules' modes, put back as they were: ``model.train(was_training)`` would set all of them to one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """At the end of this context every module of ``model`` is in the mode, training or not, that it began in."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context ``model`` is in eval mode."""
    with modes_kept(model):
        model.eval()
        yield
