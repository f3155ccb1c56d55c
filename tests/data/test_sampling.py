import random

import pytest

from inlay.data import LengthGroupedSampler

LENGTHS = [random.Random(1).randint(3, 60) for _ in range(997)]


@pytest.mark.parametrize(("count", "batch"), [(997, 8), (996, 4), (7, 8), (8, 8), (1, 1), (3, 2)])
def test_every_index_once(count, batch):
    sampler = LengthGroupedSampler(LENGTHS[:count], batch)
    assert sorted(sampler) == list(range(count)) and len(sampler) == count


def batches(sampler, size):
    order = list(sampler)
    return [[LENGTHS[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def test_batches_hold_like_lengths_and_the_longest_comes_first():
    cut = batches(LengthGroupedSampler(LENGTHS, 8), 8)
    padded = sum(len(batch) * max(batch) for batch in cut)
    assert sum(LENGTHS) / padded > 0.95
    assert max(cut[0]) == max(LENGTHS)


def test_lengths_do_not_fall_through_the_epoch():
    means = [sum(batch) / len(batch) for batch in batches(LengthGroupedSampler(LENGTHS, 8), 8)]
    first, second = means[: len(means) // 2], means[len(means) // 2 :]
    assert abs(sum(first) / len(first) - sum(second) / len(second)) < 6


def test_order_depends_on_seed_and_epoch_alone():
    sampler = LengthGroupedSampler(LENGTHS, 8, seed=3)
    first = list(sampler)
    assert list(sampler) == first == list(LengthGroupedSampler(LENGTHS, 8, seed=3))
    assert list(LengthGroupedSampler(LENGTHS, 8, seed=4)) != first
    sampler.set_epoch(1)
    assert list(sampler) != first
