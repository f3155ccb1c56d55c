"""Proof by probing: a fused block is used only where it computes what the module it stands for computes.

A module is found by its structure (what children and attributes it has), then run against the fused version on random
fp32 weights and inputs. No list of model classes is kept, and a new family is fused or left alone on its own merits.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .modes import modes_kept

#: fp32, relative to the largest output: a few roundings in another order; semantics differ by far more.
_TOLERANCE = 2e-5


def shallow(module: nn.Module, children: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``module`` that shares everything but these children and parameters; the original is not touched."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {**module._modules, **children}
    twin.__dict__["_parameters"] = {**module._parameters, **{k: nn.Parameter(v) for k, v in weights.items()}}
    return twin


#: Sizes of inputs to try: a clamp shows above it, an eps below it.
MAGNITUDES = (1e-3, 1.0, 30.0, 1e4)


def same(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> bool:
    """True if both run and give the same values; a module that cannot be run this way is not what it looked like."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            a, b = first(), second()
        except Exception:
            return False  # the structure misled us; the module stays as it is
    return close(a, b)


def close(a: Tensor, b: Tensor) -> bool:
    """Same shape, finite at the same places, and there the same but for roundings."""
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = a.nan_to_num(0.0, 0.0, 0.0), b.nan_to_num(0.0, 0.0, 0.0)
    return bool((a - b).abs().max() <= _TOLERANCE * a.abs().max()) if a.numel() else True


def same_at_all_sizes(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """:func:`same` for ``x``, whose elements are about 1, at every magnitude, and for zero."""
    inputs = [x * size for size in MAGNITUDES] + [torch.zeros_like(x)]
    return all(same(partial(first, each), partial(second, each)) for each in inputs)


def takes_only(module: nn.Module, names: Collection[str]) -> bool:
    """True if ``module.forward`` takes one input, under any name, and no other argument than ``names``.

    An argument that the fused block does not know (a gate, an index of experts) would be lost or crash it.
    """
    if "forward" in module.__dict__:
        return False  # somebody has put another one in place of the class's
    _, first, *others = inspect.signature(type(module).forward).parameters.values()
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        return False
    return all(other.name in names or (other.kind is other.VAR_KEYWORD and "kwargs" in names) for other in others)


def generator() -> torch.Generator:
    """Random numbers of the probe's own: tuning must not disturb the user's seed."""
    return torch.Generator().manual_seed(20260101)


def settings_in_both_modes(module: nn.Module, settings_of: Callable[[nn.Module], dict | None]) -> dict | None:
    """What ``settings_of`` proves of ``module`` in training and eval mode alike: dropout shows in one of them only."""
    found = []
    with modes_kept(module), torch.random.fork_rng(devices=[]):  # building layers to probe with draws random numbers
        for mode in (True, False):
            for part in module.modules():
                part.training = mode
            found.append(settings_of(module))
    return found[0] if found[0] == found[1] else None


def signature_of(module: nn.Module) -> tuple:
    """What tells two modules of one class apart: their attributes and their children's, and what their config says of
    their layer. ``layer_idx`` itself is no difference; what follows from it is."""
    own = _attributes(module)
    children = tuple((name, type(child), _attributes(child)) for name, child in module.named_children())
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    by_layer = (id(config), *_of_layer(config, layer)) if config is not None else ()
    return own, children, by_layer, "forward" in module.__dict__


def _attributes(module: nn.Module) -> tuple:
    """Values of a module's attributes, with shapes of its parameters and contents of small buffers, sorted by name."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name in ("layer_idx", "training", "config") or name.startswith("_"):
            continue
        plain = isinstance(value, bool | int | float | str | list | tuple | dict | set | torch.dtype | None)
        found[name] = repr(value) if plain else getattr(value, "__qualname__", type(value).__qualname__)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        found[name] = None if tensor is None else tuple(tensor.shape)
    for name, tensor in module._buffers.items():
        if tensor is not None and tensor.device.type == "cpu" and tensor.numel() <= 4096:
            found[f"{name} values"] = repr(tensor.tolist())
    return tuple(sorted(found.items(), key=lambda item: item[0]))


def _of_layer(config: Any, layer: Any) -> list[tuple[str, str]]:
    """What lists in ``config`` say of one layer: its type, whether it rotates, its window."""
    if not isinstance(layer, int):
        return []
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list | tuple)}
    return [(name, repr(value[layer])) for name, value in sorted(lists.items()) if layer < len(value)]
