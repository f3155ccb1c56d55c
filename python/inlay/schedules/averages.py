"""Running averages of an adapter's pieces, moved after every optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

from ..nn.holder import Holder
from .base import Run, Schedule


class Averages(Schedule):
    """Lets every piece of the adapter move its averages: ``average(decay)``; everything trains all the time."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def chosen(self, run: Run) -> Iterable[str]:
        return run.parameters()

    def after_step(self, run: Run) -> None:
        for module in run.model.modules():
            if isinstance(module, Holder) and run.adapter in module.deltas:
                module.pieces()[run.adapter].average(self.decay)
