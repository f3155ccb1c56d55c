"""Packing: several samples in one row, none of which sees another.

Rows are filled best-fit decreasing, as TRL's "bfd" strategy does. Positions restart with every sample, and no
attention mask is passed: transformers' own masks then keep the samples apart, with SDPA and eager attention through a
block-diagonal mask, with flash attention through its variable-length kernels. Whether a given model really does is
tried before training (:func:`check_samples_stay_apart`), because one that does not trains on nonsense without an error.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.modes import evaluating
from .masking import IGNORED, Sample
from .room import plain_tokens

Row = list[int]  # indices of the samples in it


def plan_rows(lengths: Sequence[int], width: int) -> list[Row]:
    """Indices of the samples of each row: longest first, each into the fullest row that still has room for it.

    Raises:
        ValueError: a sample is longer than ``width``.
    """
    if max(lengths, default=0) > width:
        raise ValueError(f"wanted samples of at most {width} tokens to pack, got one of {max(lengths)}")
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            free, row = width, len(rows)
            rows.append([])
        else:
            free, row = room.pop(place)
        rows[row].append(index)
        bisect.insort(room, (free - lengths[index], row))
    return rows


def join(samples: Sequence[Sample]) -> Sample:
    """One row: tokens and labels one after the other, positions from 0 in each sample.

    The first token of a sample is never supervised: what would predict it belongs to another sample.
    """
    row: Sample = {"input_ids": [], "labels": [], "position_ids": []}
    for sample in samples:
        row["input_ids"] += sample["input_ids"]
        row["labels"] += [IGNORED, *sample["labels"][1:]]
        row["position_ids"] += range(len(sample["input_ids"]))
    return row


class PackedSamples(Sequence[Sample]):
    """Rows of packed samples, joined as they are asked for."""

    def __init__(self, samples: Sequence[Sample], lengths: Sequence[int], width: int) -> None:
        self.samples = samples
        self.rows = plan_rows(lengths, width)
        self.lengths = [sum(lengths[i] for i in row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return join([self.samples[i] for i in self.rows[index]])


@torch.no_grad()
def logits_of_neighbours(
    model: nn.Module, length: int = 6, mask: Callable[[Tensor], Tensor] | None = None
) -> tuple[float, float]:
    """How far a sample's logits depend on its neighbour in a row, and differ from those it has alone; both relative.

    Two random samples in one row, once after each of two different first samples, and once alone.

    Args:
        mask: makes the attention mask of a row from where each token's sample starts, int64 ``[N]``; without it
            restarting positions alone tell samples apart.
    """
    first, other, second = plain_tokens(model, (3, length), torch.Generator().manual_seed(0))
    device = next(model.parameters()).device
    positions = torch.arange(length)

    def logits(*samples: Tensor) -> Tensor:
        ids = torch.cat(samples).unsqueeze(0).to(device)
        places = positions.repeat(len(samples)).unsqueeze(0).to(device)
        extra = {} if mask is None else {"attention_mask": mask(torch.arange(ids.shape[1], device=device) - places[0])}
        return model(input_ids=ids, position_ids=places, use_cache=False, **extra).logits[0, -length:].float()

    after_one, after_another, alone = logits(first, second), logits(other, second), logits(second)
    size = alone.abs().max().clamp_min(1e-6)
    return float((after_one - after_another).abs().max() / size), float((after_one - alone).abs().max() / size)


def check_samples_stay_apart(model: nn.Module, length: int = 6) -> None:
    """Raise ValueError unless a packed sample's logits ignore its neighbour and equal those it has alone."""
    config: Any = model.config
    with evaluating(model):
        leak, shift = logits_of_neighbours(model, length)
    if leak > 1e-3 or shift > 5e-2:  # a leak changes nothing but rounding; being alone may take another kernel
        attention = getattr(config, "_attn_implementation", "unknown")
        raise ValueError(
            f"packing=True: this {type(model).__name__} with {attention!r} attention lets packed samples see each "
            f"other (logits change by {max(leak, shift):.1%} with the neighbour); load it with "
            'attn_implementation="sdpa" or "flash_attention_2", or leave packing out'
        )
