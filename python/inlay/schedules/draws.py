"""Schedules that draw, every so many steps, which units train next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import Run, Schedule


class Draws(Schedule):
    """Every ``every`` steps one of the possible choices is drawn, by seed and number of the draw alone: the same on
    all ranks, and after any restart.

    Args:
        units: keys of the tensors of each unit, by name.
        always: keys that train all the time.
        every: steps between draws; 0 draws once.
        seed: of the draws.
    """

    def __init__(self, units: Mapping[str, Sequence[str]], always: Sequence[str], every: int, seed: int) -> None:
        super().__init__()
        self.units, self.always = {name: tuple(keys) for name, keys in units.items()}, tuple(always)
        self.every, self.seed = every, seed

    def draw(self, random: torch.Generator) -> list[str]:
        """Names of the units that train next."""
        raise NotImplementedError(f"{type(self).__name__} must define draw(random)")

    def number(self) -> int:
        """The number of the draw that is in force."""
        return self.taken // self.every if self.every else 0

    def drawn(self) -> list[str]:
        """Names of the units that train now."""
        return self.draw(torch.Generator().manual_seed(_mixed(self.seed, self.number())))

    def chosen(self, run: Run) -> list[str]:
        return [*self.always, *(key for name in self.drawn() for key in self.units[name])]


class DrawSome(Draws):
    """Draws ``count`` units without replacement, uniformly or by ``weights``."""

    def __init__(
        self,
        units: Mapping[str, Sequence[str]],
        always: Sequence[str],
        every: int,
        seed: int,
        count: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(units, always, every, seed)
        self.count = count
        self.weights: Tensor = torch.ones(len(units)) if weights is None else torch.tensor(weights)

    def draw(self, random: torch.Generator) -> list[str]:
        places = torch.multinomial(self.weights.double(), self.count, generator=random)
        names = list(self.units)
        return [names[place] for place in sorted(places.tolist())]


def _mixed(seed: int, number: int) -> int:
    """One seed for each draw of each seed (SplitMix64's finalizer), so that neighbours have nothing in common."""
    value = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 64)
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return (value ^ (value >> 31)) % (1 << 63)
