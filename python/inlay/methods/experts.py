"""What LoRA and S²FT share where they train the experts of a mixture (``target_parameters``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.expert_layout import ExpertsLayout
from ..pieces.experts import check_experts
from ..select import pick_groups, random_groups, weight_scores


def check_options(target_parameters: Any, experts: Any) -> None:
    """TypeError unless ``target_parameters`` is a list; ValueError where ``experts`` choose of none."""
    if isinstance(target_parameters, str):
        raise TypeError(f"target_parameters: wanted a list of names, got {target_parameters!r}")
    if experts is not None and not target_parameters:
        raise ValueError("experts: wanted target_parameters to choose experts of, got none")


def only_experts(method: Any) -> bool:
    """Whether ``method`` leaves linears alone: target_modules is empty, and there are target_parameters.

    Raises:
        ValueError: it excludes linears all the same.
    """
    if method.target_modules is None or len(method.target_modules) or not method.target_parameters:
        return False
    if method.exclude_modules:
        raise ValueError(
            f"exclude_modules: wanted none beside target_modules=[], got {method.exclude_modules!r}: experts are "
            "chosen by target_parameters"
        )
    return True


def channels_of_experts(
    method: Any, module: nn.Module, layout: ExpertsLayout, name: str, experts: Sequence[int] | None
) -> Tensor:
    """int64 ``[n, s]``: the inner channels that S²FT trains of each chosen expert of the stack ``name``."""
    if method.strategy not in ("random", "weight") or method.update != "additive" or method.keep != "additive":
        raise ValueError(
            f'{name}: channels of experts are chosen by strategy="random" or "weight" and train by update="additive" '
            f'and keep="additive", got {method.strategy!r}, {method.update!r} and {method.keep!r}'
        )
    stack = layout.stack(module, layout.down)  # [E, in, out]
    count = method.count_of(name, "down_proj", stack.shape[1], 1)
    chosen = range(stack.shape[0]) if experts is None else check_experts(experts, stack.shape[0])
    if method.strategy == "random":
        rows = [random_groups(stack.shape[1], count, method.seed, f"{name}.{expert}") for expert in chosen]
    else:
        scores = (weight_scores(stack[expert].t(), "in") for expert in chosen)
        rows = [pick_groups(score, 1, count, method.select) for score in scores]
    return torch.stack(rows)
