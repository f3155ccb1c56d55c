"""From scores to channels: groups, counts, the largest or the smallest."""

from __future__ import annotations

import torch
from torch import Tensor


def pick_groups(scores: Tensor, granularity: int, count: int, select: str) -> Tensor:
    """The ``count`` groups of ``granularity`` neighbouring channels with the largest or smallest summed score.

    Ties go to the lower index (a stable sort), so that the choice is the same everywhere. Returns sorted int64.
    """
    grouped = scores.detach().float().cpu().reshape(-1, granularity).sum(dim=1)
    order = torch.sort(grouped, descending=select == "largest", stable=True).indices
    return order[:count].sort().values


def expand_groups(groups: Tensor, granularity: int) -> Tensor:
    """Group numbers ``[g]`` to the channels in them, ``[g * granularity]``, sorted int64."""
    offsets = torch.arange(granularity, dtype=torch.int64)
    return (groups.to(torch.int64)[:, None] * granularity + offsets).reshape(-1)
