"""An L1 penalty that is felt at each optimizer step, whatever the loss and however many micro-batches it came from."""

from __future__ import annotations

from collections.abc import Iterable

from .base import Run, Schedule


class L1Penalty(Schedule):
    """Adds the gradient of ``weight·Σ|p|`` to every parameter of that ``name``; everything trains all the time.

    The loss a trainer reports is without it, and gradients are clipped before it is added.
    """

    def __init__(self, weight: float, name: str) -> None:
        super().__init__()
        self.weight, self.name = weight, name

    def chosen(self, run: Run) -> Iterable[str]:
        return run.parameters()

    def after_backward(self, run: Run) -> None:
        for name, parameter in run.parameters().items():
            if name.rpartition(".")[2] == self.name and parameter.grad is not None:
                parameter.grad.add_(parameter.detach().sign(), alpha=self.weight)
