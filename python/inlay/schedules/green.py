"""GreenTrainer's schedule: measure, weigh, choose, every so many steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.linear import is_linear
from ..roles import roles, widths
from ..select.budget import best_within
from ..sharding import from_first, whole
from .base import Run, Schedule

#: What the steps that measure train: everything (the first warms up, the last weighs), a deep and cheap tensor alone
#: (the gradient passes nearly all, and there is next to no weight gradient), a high and cheap one alone.
PHASES = ("all", "all", "all", "deepest", "deepest", "top", "top")


#: Of all weight gradients' cost, what a tensor may have that stands for its depth. A block's norm has a millionth.
_CHEAP = 1e-3

#: The clock that measures; of the process alone where others share the machine (benchmarks/green.py).
now = time.perf_counter


@dataclass
class Costs:
    """FLOPs of a step, by tensor in the order of depth: its weight gradient, and passing the gradient below it.

    Attributes:
        forward: with what every choice takes: the gradient of the input of a head that is tied to a table further down.
        elements: of each tensor, by which the optimizer's time goes.
    """

    forward: float
    own: list[float]
    passing: list[float]
    elements: list[float]


class Green(Schedule):
    """Trains the tensors of the highest importance whose step takes ``rho`` of full fine-tuning's.

    Importance is ``I = -Σ g·Δw``, the loss that the step just made took away to first order. ``Δw`` is read from
    AdamW's states (exact for weights that are kept in 16 bits), or from the weights where there are none.

    Args:
        keys: the tensors, in the order of depth. rho: the fraction. every: steps between choices.
        measured: weigh costs by times measured in the first steps; False by counted FLOPs alone, which is the same on
            every machine.
    """

    chosen_mask: Tensor
    seconds: Tensor

    def __init__(self, keys: Sequence[str], rho: float, every: int, measured: bool) -> None:
        super().__init__()
        self.keys, self.rho, self.every, self.measured = tuple(keys), rho, every, measured
        self.register_buffer("chosen_mask", torch.ones(len(keys), dtype=torch.bool))
        self.register_buffer(
            "seconds", torch.zeros(4, dtype=torch.float64)
        )  # forward, passing, weight gradients, the optimizer's step
        self.register_buffer("since", torch.zeros((), dtype=torch.int64))  # steps since measuring or weighing began
        self.register_buffer("known", torch.zeros((), dtype=torch.bool))  # whether `seconds` has been measured
        self.costs: Costs | None = None
        self.clock: dict[str, Any] = {}

    # --- what trains ---

    def phase(self) -> str:
        """Of :data:`PHASES`, or "chosen"."""
        since = 0 if self.since.is_meta else int(self.since)
        if self.measured and not self.known.is_meta and not bool(self.known):
            return PHASES[min(since, len(PHASES) - 1)]
        return "all" if since == 0 else "chosen"

    def chosen(self, run: Run) -> list[str]:
        phase = self.phase()
        if phase == "all":
            return list(self.keys)
        if phase in ("deepest", "top"):
            return [self.keys[self._probe(phase)]]
        return [key for key, on in zip(self.keys, self.chosen_mask.tolist(), strict=True) if on]

    def _probe(self, phase: str) -> int:
        """The deepest, or topmost, of the tensors whose own cost is small: a tied table is the deepest of all, and its
        gradient is the head's product too."""
        places = list(range(len(self.keys)))
        if phase == "top":
            places.reverse()
        own = self.costs.own if self.costs is not None else [0.0] * len(places)
        return next(place for place in places if own[place] <= max(_CHEAP * sum(own), min(own)))

    # --- the step ---

    def apply(self, run: Run) -> None:
        if "times" not in self.clock and self.phase() in PHASES and not self.since.is_meta:
            self.since.zero_()  # a run that was stopped while it measured, or weighed, does so anew
        super().apply(run)
        if self.costs is None and "watching" not in self.clock and not self.steps.is_meta:
            self.clock["watching"] = _Watch(run.model)
        if run.optimizer is None:  # before a forward: what happens between steps is not the step's
            self.clock.setdefault("began", now())

    def after_backward(self, run: Run) -> None:
        if "watching" in self.clock:
            self.costs = self.clock.pop("watching").costs(run, self.keys)
            check_possible(self.rho, self.costs)
        ready = now()
        if self.phase() == "all":
            plain = {key: p.detach().clone() for key, p in run.parameters().items() if not _has_states(run, p)}
            self.clock["before"] = plain
        self.clock["stepping"] = now()
        if "began" in self.clock:  # copies are no part of a step
            self.clock["began"] += self.clock["stepping"] - ready

    def after_step(self, run: Run) -> None:
        if self.costs is None:  # a step without a forward of this model
            return
        end, phase = now(), self.phase()
        self.clock.setdefault("times", {}).setdefault(phase, []).append(end - self.clock.pop("began", end))
        if phase == "all":
            self.clock.setdefault("steps", []).append(end - self.clock.pop("stepping", end))
            self.clock["importance"] = self._importance(run)
        self.since += 1
        if self.measured and not bool(self.known):
            if int(self.since) < len(PHASES):
                return
            self._settle_times()
            self._choose()
        elif phase == "all":
            self._choose()
        elif int(self.since) >= self.every:
            self._report()
            self.since.zero_()
        self.clock.pop("before", None)

    def _importance(self, run: Run) -> list[float]:
        before, parameters = self.clock.get("before", {}), run.parameters()
        found = []
        for key in self.keys:
            p = parameters[key]
            change = p.detach() - before[key] if key in before else _adam_change(run, p)
            grad = p.grad
            if grad is None or change is None:
                found.append(0.0)
            else:  # of sharded ones the sum over all processes
                found.append(-float(whole((grad.float() * change.float()).sum())))
        return found

    def _settle_times(self) -> None:
        costs = self.costs
        assert costs is not None
        best = {phase: min(times[1:] if phase == "all" else times) for phase, times in self.clock["times"].items()}
        passed = sum(costs.passing[self._probe("deepest") + 1 :]) - sum(costs.passing[self._probe("top") + 1 :])
        passing = max(best["deepest"] - best["top"], 0.0) * sum(costs.passing) / passed if passed else 0.0
        forward, step = best["top"], min(self.clock["steps"][1:])
        own = max(best["all"] - forward - passing - step, 0.0)
        self.seconds.copy_(torch.tensor([forward, passing, own, step]))
        from_first(self.seconds)
        self.known.fill_(True)

    # --- the choice ---

    def weighed(self) -> Costs:
        """Costs in seconds where they were measured, spread over tensors by FLOPs, the optimizer's by elements; else in
        FLOPs."""
        costs = self.costs
        assert costs is not None
        if not self.measured:
            return costs
        forward, passing, own, step = self.seconds.tolist()
        per_flop, per_element = own / (sum(costs.own) or 1.0), step / (sum(costs.elements) or 1.0)
        return Costs(
            forward,
            [per_flop * flops + per_element * size for flops, size in zip(costs.own, costs.elements, strict=True)],
            [passing * flops / (sum(costs.passing) or 1.0) for flops in costs.passing],
            costs.elements,
        )

    def planned(self) -> float:
        """The chosen step's share of full fine-tuning's."""
        costs = self.weighed()
        chosen = [place for place, on in enumerate(self.chosen_mask.tolist()) if on]
        full = costs.forward + sum(costs.own) + sum(costs.passing)
        deepest = min(chosen)
        return (costs.forward + sum(costs.own[p] for p in chosen) + sum(costs.passing[deepest + 1 :])) / full

    def _choose(self) -> None:
        costs = self.weighed()
        full = costs.forward + sum(costs.own) + sum(costs.passing)
        value = self.clock["importance"]
        chosen = best_within(value, costs.own, costs.passing, self.rho * full - costs.forward)
        if not chosen:
            raise RuntimeError(_impossible(self.rho, costs))
        self.chosen_mask.zero_()
        self.chosen_mask[chosen] = True
        from_first(self.chosen_mask)  # each process has its own times and lengths, and all must train the same
        self.clock["times"] = {}
        print(
            f"inlay: GreenTrainer trains {len(chosen)} of {len(self.keys)} tensors: planned {self.planned():.1%} of "
            f"full fine-tuning's {'time' if self.measured else 'FLOPs'} (rho={self.rho:g})"
        )

    def _report(self) -> None:
        times = self.clock.get("times", {}).get("chosen")
        if times and self.measured:  # beside the full step that was measured warm
            share = min(times) / float(self.seconds.sum())
            print(f"inlay: GreenTrainer: planned {self.planned():.1%}, measured {share:.1%} of a full step's time")
        self.clock["times"] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "clock": {}}


def check_possible(rho: float, costs: Costs) -> None:
    """RuntimeError if not even the cheapest tensor fits into ``rho`` of the FLOPs."""
    full = costs.forward + sum(costs.own) + sum(costs.passing)
    if costs.forward + costs.own[-1] > rho * full:
        raise RuntimeError(_impossible(rho, costs))


def _impossible(rho: float, costs: Costs) -> str:
    full = costs.forward + sum(costs.own) + sum(costs.passing)
    least, passed = float("inf"), 0.0
    for own, passing in zip(reversed(costs.own), reversed(costs.passing), strict=True):
        least, passed = min(least, passed + own), passed + passing
    return (
        f"rho={rho:g}: the forward alone is {costs.forward / full:.0%} of full fine-tuning's step, and the cheapest "
        f"tensor makes it {(costs.forward + least) / full:.0%}: wanted a rho above that; 0.5 to 0.7 leave a choice"
    )


def _has_states(run: Run, parameter: nn.Parameter) -> bool:
    state = run.optimizer.state.get(parameter, {}) if run.optimizer is not None else {}
    return "exp_avg" in state and state["exp_avg"].is_floating_point()


def _adam_change(run: Run, parameter: nn.Parameter) -> Tensor | None:
    """What AdamW just added to a parameter, but for its decay, up to its rounding."""
    assert run.optimizer is not None
    state = run.optimizer.state.get(parameter, {})
    group = next((g for g in run.optimizer.param_groups if any(p is parameter for p in g["params"])), None)
    if "exp_avg" not in state or group is None:
        return None
    step, (beta1, beta2) = float(state["step"]), group["betas"]
    mean, square = state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
    return -float(group["lr"]) * mean / (square.sqrt() + group["eps"])


class _Watch:
    """Counts what linears and embeddings see in one forward: rows, and rows per sample."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[str, tuple[int, int]] = {}
        self.handles = [
            module.register_forward_hook(lambda m, args, y, name=name: self._see(name, args))
            for name, module in model.named_modules()
            if is_linear(module)
        ]

    def _see(self, name: str, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and args[0].dim() >= 2 and name not in self.rows:
            x = args[0]
            self.rows[name] = (x.numel() // x.shape[-1], x.shape[-2])

    def costs(self, run: Run, keys: Sequence[str]) -> Costs:
        """Two FLOPs per weight and row for each product; attention's four per pair of tokens and channel, forward, and
        two and a half times that backward, count as passing its output projection."""
        for handle in self.handles:
            handle.remove()
        outputs = {name for name, role in roles(run.model).items() if role == "o_proj"}
        parameters = run.parameters()
        tied = self._rows_elsewhere(run.model, {key: parameters[key] for key in keys})
        costs = Costs(0.0, [], [], [])
        for key in keys:
            path, _, name = key.rpartition(".")
            (rows, length), size = self.rows.get(path, (0, 0)), float(parameters[key].numel())
            product = 2.0 * size * rows if name == "weight" else 0.0
            elsewhere = 2.0 * size * tied.get(key, 0)
            attends = name == "weight" and path in outputs
            attention = 2.0 * rows * length * widths(run.model.get_submodule(path))[0] if attends else 0.0
            costs.forward += product + attention + 2 * elsewhere
            costs.own.append(max(product + elsewhere, size))
            costs.passing.append(product + 2.5 * attention)
            costs.elements.append(size)
        return costs

    def _rows_elsewhere(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
        """Of each weight by key, the rows that other linears multiply by it: those of a head tied to a table."""
        names = {id(parameter): key for key, parameter in parameters.items()}
        found: dict[str, int] = {}
        for path, (rows, _) in self.rows.items():
            key = names.get(id(model.get_submodule(path)._parameters.get("weight")))
            if key is not None and key != f"{path}.weight":
                found[key] = found.get(key, 0) + rows
        return found
