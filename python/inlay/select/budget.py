"""The most valuable tensors whose gradients fit into a budget: dynamic programming over depth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Steps that the budget is divided into, as in GreenTrainer's code (Tq = 1000).
RESOLUTION = 1000


def best_within(value: Sequence[float], own: Sequence[float], passing: Sequence[float], budget: float) -> list[int]:
    """Indices of the tensors to train, ascending; tensors are in the order of their depth, the input's first.

    Maximizes ``Σ value`` with ``Σ own`` of the chosen, and ``passing`` of everything above the deepest chosen one,
    within ``budget``: a gradient has to pass what stands above to get there. Costs are rounded up to a thousandth of
    the budget, so that the choice never exceeds it.

    Args:
        value: what training a tensor is worth. own: the cost of its weight gradient and its step.
        passing: the cost of the gradient of its input, which what stands below needs.

    Returns:
        An empty list if nothing fits.
    """
    if budget <= 0:
        return []
    unit = budget / RESOLUTION
    slots = torch.ceil(torch.tensor(own, dtype=torch.float64) / unit - 1e-9).long().clamp_min(0)
    worth = torch.tensor(value, dtype=torch.float64)
    table = torch.full((RESOLUTION + 1,), -torch.inf, dtype=torch.float64)
    table[0] = 0.0
    taken: list[Tensor] = []
    passed, best = 0.0, (0.0, -1, 0)
    for place in reversed(range(len(value))):  # from the output down; `place` may be the deepest chosen
        room = RESOLUTION - math.ceil(passed / unit - 1e-9)
        cost = int(slots[place])
        shifted = torch.full_like(table, -torch.inf)
        if cost <= RESOLUTION:
            shifted[cost:] = table[: RESOLUTION + 1 - cost] + worth[place]
        if room >= 0:
            most, at = shifted[: room + 1].max(0)
            if float(most) > best[0]:
                best = (float(most), place, int(at))
        taken.append(shifted > table)
        table = torch.maximum(table, shifted)
        passed += passing[place]
    return _walk_back(best, taken, slots)


def _walk_back(best: tuple[float, int, int], taken: list[Tensor], slots: Tensor) -> list[int]:
    _, place, at = best
    if place < 0:
        return []
    chosen, count = [place], len(taken)
    at -= int(slots[place])
    for above in range(place + 1, count):
        if bool(taken[count - 1 - above][at]):
            chosen.append(above)
            at -= int(slots[above])
    return chosen
