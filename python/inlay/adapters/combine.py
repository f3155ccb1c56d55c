"""One adapter from several: their weighted sum, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..install import install
from ..methods import Method
from ..nn.whole import owners, whole_tensors
from ..pieces import Whole
from ..state import activate, pieces_of, require_state


def add_weighted_adapter(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> nn.Module:
    """Add an adapter whose ``ΔW`` is ``Σ weight·ΔW`` of ``adapters``; the active ones stay active.

    A tensor trained whole becomes the base's plus the weighted sum of what each adapter changed of it.
    Submatrices take the union of the channels, low-rank factors are put side by side (ranks add up): nothing is
    approximated. The name and the first three arguments are PEFT's.

    Raises:
        TypeError: the model is not tuned.
        ValueError: an unknown or taken name; no or not as many weights; adapters of different kinds, or of a kind
            that is part of its base weight (``update="in_place"``, ``keep="exact"``).
    """
    state = require_state(model, "add_weighted_adapter")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"wanted one weight per adapter, got {len(adapters)} adapters and {len(weights)} weights")
    for name in adapters:
        if name not in state.methods:
            raise ValueError(f"no adapter {name!r}; there are {sorted(state.methods)}")
    if adapter_name in state.methods:
        raise ValueError(f"this model has an adapter {adapter_name!r} already; pass another adapter_name")
    methods = [state.methods[name] for name in adapters]
    kinds = {type(method).__name__ for method in methods}
    if len(kinds) != 1:
        raise ValueError(
            f"wanted adapters of one kind to add up, got {sorted(kinds)}; set_adapter them together instead"
        )
    parts = [pieces_of(model, name) for name in adapters]
    method, pieces = type(methods[0]).combine(methods, list(weights), parts)
    active = list(state.active)
    loose = _unfrozen_by_user(model, adapters)
    whole = {
        key: Whole(value, held="base" if key in loose else "fp32")
        for key, value in combined_whole(model, adapters, weights).items()
    }
    method = replace(method, modules_to_save=_modules_of(methods))
    install(
        model,
        method,
        pieces,
        adapter_name,
        sample=state.base_sample,
        whole=whole,
        fused_blocks=False,
        fused_loss=False,
    )
    activate(model, active)
    return model


@torch.no_grad()
def combined_whole(model: nn.Module, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    """``W + Σ weight·(Wᵢ - W)`` of the tensors that ``adapters`` train whole, in fp32, by state-dict key."""
    originals = {key: held.original for key, _, _, held in owners(model)}
    found: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for key, tensor in whole_tensors(model, adapter).items():
            base = originals[key].float() if tensor.is_floating_point() else originals[key]
            change = weight * (tensor - base)
            found[key] = found.get(key, base.clone()) + (change if tensor.is_floating_point() else 0)
    return found


def _modules_of(methods: Sequence[Method]) -> list[str] | None:
    return list(dict.fromkeys(name for method in methods for name in method.modules_to_save or ())) or None


def _unfrozen_by_user(model: nn.Module, adapters: Sequence[str]) -> list[str]:
    """Keys of tensors whose copies have the base's dtype in every adapter that has one."""
    return [
        key
        for key, _, _, held in owners(model)
        if all(held.copies[name].dtype == held.original.dtype for name in adapters if name in held.copies)
    ]
