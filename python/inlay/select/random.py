"""Random selection, the default of S²FT (S²FT-R)."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def generator_of(seed: int, name: str) -> torch.Generator:
    """Random numbers that belong to ``(seed, name)``: independent of threads, ranks and of what else is drawn."""
    # torch's CPU generator reads the low 32 bits of its seed alone, so both must be in them
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def random_groups(groups: int, count: int, seed: int, name: str) -> Tensor:
    """``count`` of ``groups`` at random, sorted int64, the same for a linear whichever others are tuned."""
    return torch.randperm(groups, generator=generator_of(seed, name))[:count].sort().values
