"""The contract of a schedule, and the hooks that run it under any trainer or bare loop.

A schedule stands on the model as a module of buffers, so that its state is in every checkpoint of the model. It hears
of steps through torch's hooks for all optimizers, and acts at the first training forward, after each step, and when a
checkpoint has moved it to another point.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..nn.holder import Holder
from ..nn.whole import begin, owners

#: Where a model keeps its schedules, by adapter.
SCHEDULES = "inlay_schedules"


@dataclass
class Run:
    """What a schedule acts on: one adapter of a model, and the optimizer where there is one at hand."""

    model: nn.Module
    adapter: str
    optimizer: Optimizer | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything the adapter may train, by state-dict key: what trains whole, and the parameters of its pieces."""
        found: dict[str, nn.Parameter] = {}
        for path, module in self.model.named_modules():
            if isinstance(module, Holder) and self.adapter in module.deltas:
                piece = module.deltas[self.adapter]
                found |= {f"{path}.deltas.{self.adapter}.{name}": p for name, p in piece.named_parameters()}
        for key, module, name, held in owners(self.model):
            if held.active == self.adapter and isinstance(live := module._parameters.get(name), nn.Parameter):
                found[key] = live
        return found

    def switch(self, chosen: Iterable[str]) -> None:
        """Train the parameters ``chosen`` and no other of the adapter: gradients and optimizer states of those end."""
        wanted, parameters = set(chosen), self.parameters()
        trained = {id(parameters[name]) for name in wanted}  # a tied one has several names
        for _, module, name, held in owners(self.model):
            live = module._parameters.get(name)
            if held.active == self.adapter and id(live) in trained:
                begin(held, self.adapter, live)
        for parameter in parameters.values():
            if id(parameter) in trained:
                parameter.requires_grad_(True)
                continue
            parameter.requires_grad_(False)
            parameter.grad = None
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)


class Schedule(nn.Module):
    """What of an adapter trains when. All its state is in buffers.

    Attributes:
        steps: optimizer steps so far, int64.
    """

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.applied: frozenset[str] | None = None
        self.frozen = False  # of an adapter that was loaded not to train
        self.seen: dict[str, Any] = {}

    @property
    def taken(self) -> int:
        """:attr:`steps` as a number; 0 where it has no data (estimates)."""
        return 0 if self.steps.is_meta else int(self.steps)

    def chosen(self, run: Run) -> Iterable[str]:
        """The names of the parameters that train at this point: a function of the buffers."""
        raise NotImplementedError(f"{type(self).__name__} must define chosen(run)")

    def after_backward(self, run: Run) -> None:
        """Before the optimizer steps, gradients at hand."""

    def after_step(self, run: Run) -> None:
        """After the optimizer stepped; ``steps`` counts it already."""

    def apply(self, run: Run) -> None:
        """Make the model train what :meth:`chosen` says, if it does not yet."""
        chosen = frozenset(self.chosen(run))
        if chosen != self.applied:
            run.switch(chosen)
            self.applied = chosen

    def wake(self) -> None:
        """What trains has been set by somebody else (``set_adapter``): choose again at the next forward."""
        self.applied, self.frozen = None, False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "applied": None, "seen": {}}  # a copy begins by looking at its own model

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedule:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made


# --- hooks ----------------------------------------------------------------------------------------------------------

_live: WeakSet[Schedule] = WeakSet()
#: Forwards in a row before which weights changed without a step, after which it is no editing by hand.
_PATIENCE = 8


def follow(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model with schedules. A function, so that models copy and pickle.

    Raises:
        RuntimeError: weights changed and no torch optimizer stepped, so that a schedule would stand still.
    """
    if not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    for adapter, schedule in _choosing(model).items():
        run = Run(model, adapter)
        _check_followed(schedule, run)
        schedule.apply(run)
        schedule.seen["model"] = ref(model)
        schedule.seen["adapter"] = adapter
        _live.add(schedule)


def start(model: nn.Module) -> None:
    """Let the schedules of the active adapters choose now, not only at the first training forward."""
    for adapter, schedule in _choosing(model).items():
        schedule.apply(Run(model, adapter))


def may_train(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimizer should have: all that requires a gradient, or that a schedule may come to choose."""
    ids = {id(p) for adapter in _choosing(model) for p in Run(model, adapter).parameters().values()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad or id(p) in ids}


def active_schedules(model: nn.Module) -> dict[str, Any]:
    """The schedules of the active adapters of ``model``."""
    held: Any = model._modules.get(SCHEDULES)
    state = getattr(model, "inlay_state", None)
    return {} if held is None or state is None else {name: held[name] for name in state.active if name in held}


def _choosing(model: nn.Module) -> dict[str, Any]:
    """Those of the active schedules whose adapter trains."""
    return {name: schedule for name, schedule in active_schedules(model).items() if not schedule.frozen}


def _check_followed(schedule: Schedule, run: Run) -> None:
    """Whether a parameter that trains was written to since the last forward, and no step was heard of."""
    first = next((p for p in run.parameters().values() if p.requires_grad), None)
    if first is None:
        return
    now = (id(first), first._version)
    before, steps = schedule.seen.get("version"), (schedule.taken, schedule.steps._version)
    changed = before is not None and before[0] == now[0] and before[1] != now[1]
    alone = schedule.seen.get("alone", 0) + 1 if changed and schedule.seen.get("steps") == steps else 0
    schedule.seen["alone"] = alone
    if alone >= _PATIENCE:
        raise RuntimeError(
            f"{type(schedule).__name__}: weights changed before each of {alone} forwards and no optimizer of torch "
            "(torch.optim.Optimizer) was seen to step, so that the schedule would never go on; wanted one whose step "
            "hooks run: use inlay.optim.AdamW, or any optimizer that derives from torch.optim.Optimizer"
        )
    schedule.seen["version"], schedule.seen["steps"] = now, steps


def _runs(optimizer: Optimizer) -> list[tuple[Schedule, Run]]:
    """The schedules that ``optimizer`` trains for."""
    found = []
    for schedule in list(_live):
        model = schedule.seen["model"]() if "model" in schedule.seen else None
        if model is None or not any(schedule is active for active in _choosing(model).values()):
            continue
        run = Run(model, schedule.seen["adapter"], optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        ours = run.parameters()
        if not held.isdisjoint(id(p) for p in ours.values()):
            _check_complete(schedule, ours, held)
            found.append((schedule, run))
    return found


def _check_complete(schedule: Schedule, ours: dict[str, nn.Parameter], held: set[int]) -> None:
    missing = [name for name, p in ours.items() if id(p) not in held]
    if missing:
        raise RuntimeError(
            f"{type(schedule).__name__}: the optimizer lacks {len(missing)} of the {len(ours)} parameters that the "
            f"schedule may train, first {missing[0]}: wanted all of model.parameters(); make the optimizer of all "
            "parameters, or of those that require a gradient before the first training forward"
        )


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for schedule, run in _runs(optimizer):
        schedule.after_backward(run)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for schedule, run in _runs(optimizer):
        schedule.steps += 1
        schedule.after_step(run)
        schedule.apply(run)
        first = next((p for p in run.parameters().values() if p.requires_grad), None)
        if first is not None:
            schedule.seen["version"] = (id(first), first._version)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
