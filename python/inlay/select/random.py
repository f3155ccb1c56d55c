"""Random selection, the default of S²FT (S²FT-R)."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def random_groups(groups: int, count: int, seed: int, name: str) -> Tensor:
    """``count`` of ``groups`` at random, sorted int64. Keyed by ``(seed, name)``: independent of threads, ranks and
    of which other linears are tuned."""
    generator = torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
    return torch.randperm(groups, generator=generator)[:count].sort().values
