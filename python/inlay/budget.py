"""``Budget``: the method that gets the most out of the memory and the speed that there are.

GreenTrainer (Huang et al., ICLR 2024, arXiv:2309.13192) chooses tensors by importance within a share of full
fine-tuning's FLOPs. This chooses among pieces of any kind (channels, ranks, whole blocks, from some depth up) within
bytes and tokens per second: what each would cost is counted by :func:`inlay.estimate`, and weighed by the speed of this
machine.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .bases.linear import is_linear, out_in_view
from .bases.quantized import QuantizedWeight
from .estimate import Estimate, estimate
from .methods import Calibration, Method
from .methods.freeze_layers import FreezeLayers
from .methods.full import Full
from .methods.lora import LoRA
from .methods.s2ft import S2FT
from .roles import roles
from .select.trial import loss_of
from .select.untouched import one_at_a_time
from .sites import block_of, blocks_of

_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
#: The largest rank whose part of a gradient is weighed.
_MOST_RANK = 64


@dataclass
class Choice:
    """One way to train: a method for the ``count`` uppermost blocks, what it is worth and what it costs."""

    method: Method
    value: float
    estimate: Estimate
    tokens_per_second: float

    def __str__(self) -> str:
        gib = self.estimate.peak / 2**30
        return f"{self.method}: {gib:.2f} GiB above the model, about {self.tokens_per_second:,.0f} tokens/s"


@dataclass
class Budget(Method):
    """Choose a method by what it may cost; ``inlay.tune`` then tunes with that one, and files speak of it alone.

    What a choice is worth is how much of the squared gradient on the calibration batches it can follow (ours): of
    S²FT's random channels their share, of rank r the r largest squared singular values, of a whole weight all. Speed is
    predicted from counted FLOPs and the time of one eager step on the first batch, which fused blocks only improve.

    Attributes:
        memory: bytes above the loaded model at the peak of a step, or text such as "1.5 GiB"; None for any.
        tokens_per_second: at least; None for any.
        batch, seq: the shape of a training step; of models whose labels are not one per token, that of the first
            calibration batch. optimizer: as for :func:`inlay.estimate`.
    """

    memory: int | str | None = None
    tokens_per_second: float | None = None
    batch: int = 1
    seq: int = 1024
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        self.memory = bytes_of(self.memory)
        if self.memory is None and self.tokens_per_second is None:
            raise ValueError("wanted memory=, tokens_per_second= or both to keep to, got neither")
        if self.tokens_per_second is not None and not self.tokens_per_second > 0:
            raise ValueError(f"tokens_per_second: wanted a speed above 0, got {self.tokens_per_second}")

    def without_data(self) -> Method:
        raise ValueError("Budget chooses by data: estimate the method that it chose, Budget(...).settled(model, data)")

    def settled(self, model: nn.Module, calibration: Calibration | None, base: Any = None) -> Method:
        """The method of the choice that is worth the most within the budget; what it is is printed.

        Raises:
            ValueError: no calibration batch with labels; or nothing fits, with what would come closest.
        """
        found = self.choices(model, calibration, base)
        fitting = [choice for choice in found if self._fits(choice)]
        if not fitting:
            raise ValueError(f"nothing fits into {self._told()}; the least that trains at all is\n  " + _least(found))
        best = max(fitting, key=lambda choice: choice.value)
        print(f"inlay: Budget of {self._told()}: {best}")
        return best.method

    def choices(self, model: nn.Module, calibration: Calibration | None, base: Any = None) -> list[Choice]:
        """For each kind of piece and size, the choice from as deep as the budget lets it be, or from the last block."""
        batches = list(calibration or ())
        energies, rate = _weigh(model, batches)
        step = self._step(batches[0])
        depth = len(blocks_of(model))
        found = []
        for kind in self._kinds(model):
            tried: dict[int, Choice] = {}

            def at(count: int, kind: _Kind = kind, tried: dict[int, Choice] = tried) -> Choice:
                if count not in tried:
                    tried[count] = self._choice(model, kind, count, energies, rate, base, step)
                return tried[count]

            found.append(at(_deepest(depth, lambda count, at=at: self._fits(at(count)))))  # type: ignore[misc]
        return found

    def _choice(
        self,
        model: nn.Module,
        kind: _Kind,
        count: int,
        energies: Mapping[str, Energy],
        rate: float,
        base: Any,
        step: Mapping[str, Any],
    ) -> Choice:
        kept = blocks_of(model)[-count:]
        value = sum(kind.value(name, energy) for name, energy in energies.items() if block_of(name, kept))
        method = kind.make(count)
        cost = estimate(model, method, base=base, optimizer=self.optimizer, **step)
        return Choice(method, value, cost, cost.tokens * rate / max(cost.step_flops, 1.0))

    def _step(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        """A step as :func:`inlay.estimate` takes it; of a model of no texts, or with other labels, the batch shown."""
        ids, labels = shown.get("input_ids"), shown.get("labels")
        if isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.shape == labels.shape:
            return {"batch": self.batch, "seq": self.seq}
        return {"batch": {key: value for key, value in shown.items() if isinstance(value, Tensor)}}

    def _kinds(self, model: nn.Module) -> list[_Kind]:
        depth, played = len(blocks_of(model)), set(roles(model))
        kinds: list[_Kind] = [_Channels(ratio, depth, self.seed, played) for ratio in (0.01, 0.03, 0.1, 0.3)]
        kinds += [_Rank(r, depth, self.seed) for r in (4, 16, 64)]
        packed = any(isinstance(module, QuantizedWeight) for module in model.modules())
        return kinds if packed else [*kinds, _Blocks()]

    def _fits(self, choice: Choice) -> bool:
        memory = self.memory is None or choice.estimate.peak <= int(self.memory)
        return memory and (self.tokens_per_second is None or choice.tokens_per_second >= self.tokens_per_second)

    def _told(self) -> str:
        memory = "" if self.memory is None else f"{int(self.memory) / 2**30:.2f} GiB above the model"
        speed = "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s"
        return " and ".join(part for part in (memory, speed) if part) + f" at {self.batch} x {self.seq} tokens"


@dataclass
class Energy:
    """Of one weight's gradient: its squared norm, and its largest squared singular values, falling."""

    total: float
    singular: Tensor


class _Kind(Protocol):
    """A kind of piece of one size."""

    def make(self, count: int) -> Method:
        """The method that puts it into the ``count`` uppermost blocks."""

    def value(self, name: str, energy: Energy) -> float:
        """What it is worth on the linear ``name``."""


@dataclass
class _Channels:
    ratio: float
    depth: int
    seed: int
    targets: set[str]

    def make(self, count: int) -> Method:
        return S2FT(ratio=self.ratio, layers_to_transform=_upper(count, self.depth), seed=self.seed)

    def value(self, name: str, energy: Energy) -> float:
        return self.ratio * energy.total if name in self.targets else 0.0


@dataclass
class _Rank:
    r: int
    depth: int
    seed: int

    def make(self, count: int) -> Method:
        layers = _upper(count, self.depth)
        return LoRA(r=self.r, lora_alpha=2 * self.r, layers_to_transform=layers, seed=self.seed)

    def value(self, name: str, energy: Energy) -> float:
        return float(energy.singular[: self.r].sum())


class _Blocks:
    def make(self, count: int) -> Method:
        return FreezeLayers(layers=count, head=False)

    def value(self, name: str, energy: Energy) -> float:
        return energy.total


def _upper(count: int, depth: int) -> list[int] | None:
    return None if count == depth else list(range(depth - count, depth))


def bytes_of(value: int | str | None) -> int | None:
    """A number of bytes, given as one or as text: "800 MiB", "1.5GB"; ValueError if it is neither."""
    if value is None or isinstance(value, int):
        return value
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMG]i?B)\s*", value, re.I)
    if found is None:
        raise ValueError(f'memory: wanted bytes, or text such as "1.5 GiB" or "800 MB", got {value!r}')
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _deepest(depth: int, fits: Callable[[int], bool]) -> int:
    """The most blocks that fit, by bisection: more of them cost more. 1 if not even that does."""
    low, high = 1, depth
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _least(found: list[Choice]) -> str:
    return "\n  ".join(str(min(found, key=key)) for key in (lambda c: c.estimate.peak, lambda c: -c.tokens_per_second))


def _weigh(model: nn.Module, batches: list[Mapping[str, Any]]) -> tuple[dict[str, Energy], float]:
    """The energies of the linears in blocks, means over batches, and how many FLOPs a second an eager step makes."""
    if not batches:
        raise ValueError("Budget wants calibration batches with labels, got none; pass tune(..., calibration=[{...}])")
    blocks = blocks_of(model)
    linears = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and not isinstance(module, QuantizedWeight) and block_of(name, blocks)
    }
    sums: dict[str, Energy] = {}
    weighing = False  # what the first two steps are for is their time

    def see(name: str, gradient: Tensor) -> None:
        if weighing:
            _add(sums, name, gradient, out_in_view(linears[name]).shape, len(batches))

    with one_at_a_time(model, {name: module.weight for name, module in linears.items()}, see):
        model.eval()
        loss_of(model, batches[0]).backward()  # warms up
        started = time.perf_counter()
        loss_of(model, batches[0]).backward()
        seconds = time.perf_counter() - started
        weighing = True
        for batch in batches:
            loss_of(model, batch).backward()
    flops = estimate(model, Full(target_modules=[f"{name}.weight" for name in linears]), batch=batches[0]).step_flops
    return sums, flops / max(seconds, 1e-9)


def _add(sums: dict[str, Energy], name: str, gradient: Tensor, shape: torch.Size, batches: int) -> None:
    gradient = (gradient if gradient.shape == shape else gradient.t()).float()
    small = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.t()
    rank = min(_MOST_RANK, small.shape[0])
    squares = torch.linalg.eigvalsh(small @ small.t()).flip(0).clamp_min(0)[:rank] / batches
    total = float(gradient.square().sum()) / batches
    held = sums.get(name)
    sums[name] = Energy(total, squares) if held is None else Energy(held.total + total, held.singular + squares)
