"""What a method plans, with what trains beside it on every model: a task's head, and ``modules_to_save``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from .bases import BaseConfig
from .methods import Method, Plan
from .nn.whole import keys_of
from .pieces import Whole
from .task_head import whole_names, without_whole
from .ties import check_not_whole


def completed(model: nn.Module, method: Method, plan: Plan, base: BaseConfig | None = None) -> tuple[Method, Plan]:
    """``method`` with the full names of the modules that train whole beside it, and ``plan`` with their tensors.

    Raises:
        ValueError: one of them is a target too, is quantized, or carries another adapter's piece; or nothing is left
            to train; or a tensor is chosen twice; or ``base`` would quantize what the method trains whole.
    """
    if base is not None:
        _check_dense(model, method, plan, base)
    names = whole_names(model, method)
    method = replace(method, modules_to_save=names) if names else method
    by_path = {site.path: (site, build) for site, build in plan.pieces.items()}
    kept = without_whole(by_path, names)
    keys = keys_of(model, names)
    whole = {**plan.whole, **dict.fromkeys([key for key in keys if key not in plan.whole], Whole())}
    if not kept and not whole:
        raise ValueError(f"{type(method).__name__} leaves nothing to train in this {type(model).__name__}")
    _check_apart(kept, whole)
    check_not_whole(model, kept, whole)
    keys_of(model, whole)  # none of them is quantized or has a piece
    schedule = plan.schedule if plan.schedule is not None else method.schedule(model)
    return method, Plan({site: build for site, build in kept.values()}, whole, schedule)


def _check_dense(model: nn.Module, method: Method, plan: Plan, base: BaseConfig) -> None:
    packed = {f"{name}.weight" for name in base.names(model)}
    for key in plan.whole:
        if key in packed:
            raise ValueError(
                f"{key} trains whole under {type(method).__name__}, and base={base.base!r} would quantize it: wanted "
                "it dense; tune without base, leave it out by BaseConfig(skip_modules=[...]), or train a delta (LoRA)"
            )


def _check_apart(pieces: Iterable[str], whole: Iterable[str]) -> None:
    held = set(whole)
    for path in pieces:
        for name in ("weight", "bias"):
            if f"{path}.{name}" in held:
                raise ValueError(
                    f"{path}.{name} would train whole, and a piece sits on {path}: choose one of them (target_modules, "
                    "modules_to_save)"
                )
