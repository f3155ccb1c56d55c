"""Length-grouped batches: less padding, and the longest batch first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL_BATCHES = 50  # samples of this many batches are sorted together: enough to cut padding, few enough to stay random


class LengthGroupedSampler(Sampler[int]):
    """Indices such that each run of `batch_size` has samples of like length, the runs in random order.

    transformers' sampler of that name walks from long to short samples within each pool, so that
    training ends on the shortest ones, at the lowest learning rate; here the order of batches is
    shuffled. The batch with the longest sample comes first: what runs out of memory does so at once.

    Order depends on (seed, epoch) alone, which makes a resumed run see the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches = [batch for pool in _chunks(order, POOL_BATCHES * self.batch_size) for batch in self._group(pool)]
        # A short batch must stay last: whoever cuts our indices into batches counts from the front.
        rest = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        if shuffled:
            longest = max(range(len(shuffled)), key=lambda i: max(self.lengths[j] for j in shuffled[i]))
            shuffled[0], shuffled[longest] = shuffled[longest], shuffled[0]
        return (index for batch in shuffled + rest for index in batch)

    def _group(self, pool: list[int]) -> list[list[int]]:
        return _chunks(sorted(pool, key=lambda i: self.lengths[i], reverse=True), self.batch_size)


def _chunks(values: list[int], size: int) -> list[list[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
