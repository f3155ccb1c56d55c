"""Selection of salient channels: the size of their activations on calibration data, class by class where there are any.

Source: Zhao et al., "SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels", IJCV 2024,
arXiv:2309.08513 (class-aware importance score).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .activation import run_batches


def salience_scores(model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """``‖y_c‖₂`` over all positions of ``batches`` for each output channel of each named linear, fp32.

    Where a batch has one integer label per sample, the mean over classes of the norm within each: a class counts as
    much as any other, however many samples it has. Positions that ``attention_mask [B, T]`` hides do not count.
    """
    squares: dict[str, dict[int, Tensor]] = {name: {} for name in names}
    running: dict[str, Any] = {}

    def remembering() -> Iterator[Mapping[str, Any]]:
        for batch in batches:
            running.clear()
            running.update(batch)
            yield batch

    def add(name: str, module: nn.Module, args: tuple, y: Tensor) -> None:
        mask = running.get("attention_mask")
        wide = y.detach().float().square()
        if mask is not None and mask.shape == y.shape[:-1]:
            wide = wide * mask.to(wide).unsqueeze(-1)
        samples = wide.reshape(y.shape[0], -1, y.shape[-1]).sum(1)
        for label, sample in zip(_labels(running.get("labels"), y.shape[0]), samples, strict=True):
            held = squares[name]
            held[label] = held[label] + sample if label in held else sample

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(partial(add, name))
            stack.callback(handle.remove)
        run_batches(model, remembering())
    missing = [name for name in names if not squares[name]]
    if missing:
        raise ValueError(f"calibration never ran {missing[:3]}; use batches that reach them or exclude these modules")
    return {name: torch.stack([total.sqrt() for total in held.values()]).mean(0) for name, held in squares.items()}


def _labels(labels: Any, samples: int) -> list[int]:
    """The class of each sample; 0 for all where there are no classes, or where rows are no samples."""
    one_each = isinstance(labels, Tensor) and labels.shape == (samples,) and not labels.is_floating_point()
    return labels.tolist() if one_each else [0] * samples
