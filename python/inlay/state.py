"""What a tuned model keeps: its adapters, which of them are on, and what it takes to undo them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .bases import BaseConfig, QuantizedWeight
from .integrations.padding_free import PaddingFree
from .methods import Method
from .nn.head import remove_head
from .nn.holder import Holder
from .nn.mixed import Mixed, unmix
from .nn.partial import install_partial_backprop, remove_partial_backprop
from .nn.tuned_linear import TunedLinear
from .nn.tuned_output import TunedOutput, release
from .nn.whole import active_whole, begin, owners, remove_whole, restore_whole, switch_whole, train_whole
from .schedules import SCHEDULES, active_schedules
from .sharding import is_sharded
from .ties import is_tied

STATE_ATTRIBUTE = "inlay_state"
_SAMPLED_WEIGHTS, _SAMPLED_VALUES = 4, 16
_DDP_LIST, _DDP_OURS = "_ddp_params_and_buffers_to_ignore", "_inlay_kept_from_ddp"


@dataclass
class TuneState:
    """What ``tune`` did to a model and must be able to undo.

    Attributes:
        methods: adapters by name, with the config each was made from.
        active: names of the adapters that are on, in order.
        base_sample: a few values of some tuned base weights, to recognise the base again at load.
        fingerprint: marks of many more, to measure how far a base is off; see :mod:`inlay.fingerprint`.
        base: how ``tune(base=...)`` or ``load(base=...)`` quantized the model, None if they did not.
        handles: hooks installed on the model; each has ``remove()``.
        padding_free: whether training drops the padding of batches.
    """

    methods: dict[str, Method] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    base_sample: dict[str, list[float]] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    base: BaseConfig | None = None
    handles: list[RemovableHandle] = field(default_factory=list)
    padding_free: PaddingFree = field(default_factory=PaddingFree)


def state_of(model: nn.Module) -> TuneState | None:
    """The tune state of ``model``, or None if it is not tuned."""
    return getattr(model, STATE_ATTRIBUTE, None)


def require_state(model: nn.Module, what: str) -> TuneState:
    """The tune state, or TypeError saying that ``what`` wants a tuned model."""
    state = state_of(model)
    if state is None:
        raise TypeError(f"{what}: wanted a model from inlay.tune or inlay.load, got a plain {type(model).__name__}")
    return state


def tuned_modules(model: nn.Module) -> dict[str, Holder]:
    """Every module that holds pieces, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Holder)}


def tuned_linears(model: nn.Module) -> dict[str, TunedLinear]:
    """Every TunedLinear by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TunedLinear)}


def pieces_of(model: nn.Module, adapter: str) -> dict[str, Any]:
    """The pieces of one adapter by the name of their module; not those that only stand for one on a tied module."""
    held = {name: module.pieces().get(adapter) for name, module in tuned_modules(model).items()}
    return {name: piece for name, piece in held.items() if piece is not None and not is_tied(piece)}


def sample_weights(model: nn.Module, names: list[str], every: bool = False) -> dict[str, list[float]]:
    """Some evenly spaced values of a few (or all) of the named weights, in fp32."""
    step = 1 if every else max(1, len(names) // _SAMPLED_WEIGHTS)
    sample = {}
    for name in names[::step][: None if every else _SAMPLED_WEIGHTS]:
        weight = getattr(model.get_submodule(name), "weight", None)
        if weight is None or weight.device.type == "meta":
            continue
        sample[name] = sample_of(weight)
    return sample


def sample_of(weight: Tensor) -> list[float]:
    """Some evenly spaced values of ``weight``, in fp32."""
    flat = weight.detach().reshape(-1)
    positions = torch.arange(_SAMPLED_VALUES, device=flat.device) * max(1, flat.numel() // _SAMPLED_VALUES)
    return flat[positions.clamp(max=flat.numel() - 1)].float().tolist()


# --- which adapters are on ---


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Make the adapters ``names`` the active, trainable ones; the others stay loaded, frozen.

    Raises:
        ValueError: there is no such adapter, or these cannot be active together.
    """
    state, names = require_state(model, "set_adapter"), tuple(names)
    for name in names:
        if name not in state.methods:
            raise ValueError(f"no adapter {name!r}; there are {sorted(state.methods)}")
    held = tuned_modules(model)
    switch_whole(model, names)
    train_whole(model, names)
    state.active = names
    for module in held.values():
        module.activate(names)
        for name, piece in module.pieces().items():
            piece.requires_grad_(name in names)
    for schedule in active_schedules(model).values():
        schedule.wake()
    install_partial_backprop(model)
    keep_from_ddp(model)


def switch_off(model: nn.Module) -> None:
    """Behave as the base model, until :func:`switch_on` or :func:`activate`."""
    switch_whole(model, ())
    for module in tuned_modules(model).values():
        module.activate(())


def switch_on(model: nn.Module) -> None:
    """Undo :func:`switch_off`."""
    active = require_state(model, "enable_adapters").active
    switch_whole(model, active)
    for module in tuned_modules(model).values():
        module.activate(active)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context ``model`` behaves as its base model."""
    require_state(model, "disabled")
    before = {module: module.active for module in tuned_modules(model).values()}
    whole = active_whole(model)
    switch_off(model)
    try:
        yield model
    finally:
        restore_whole(model, whole)
        for module, active in before.items():
            module.activate(active)


def forget(model: nn.Module, adapter: str) -> None:
    """Remove an adapter that is not active.

    Raises:
        ValueError: it is active, or there is none of this name.
    """
    state = require_state(model, "delete_adapter")
    if adapter in state.active:
        raise ValueError(f"adapter {adapter!r} is active; set_adapter another one first")
    if state.methods.pop(adapter, None) is None:
        raise ValueError(f"no adapter {adapter!r}; there are {sorted(state.methods)}")
    for module in tuned_modules(model).values():
        if adapter in module.deltas:
            module.remove_delta(adapter)
    remove_whole(model, adapter)
    schedules: Any = model._modules.get(SCHEDULES)
    if schedules is not None and adapter in schedules:
        del schedules[adapter]


def make_plain(model: nn.Module) -> nn.Module:
    """Undo every hook, and every mixin on a module; what holds pieces forgets them."""
    state = require_state(model, "make_plain")
    for handle in state.handles:
        handle.remove()
    remove_head(model)
    remove_partial_backprop(model)
    for module in list(model.modules()):
        if isinstance(module, TunedOutput):
            release(module)
        while isinstance(module, Mixed):
            unmix(module)
    keep_from_ddp(model)
    for attribute in [key for key in model.__dict__ if str(key).startswith("inlay_")]:
        delattr(model, attribute)
    model._modules.pop(SCHEDULES, None)
    return model


def keep_from_ddp(model: nn.Module) -> None:
    """Tell DDP not to broadcast what is the same everywhere: packed weights at the start, and at every forward the
    buffers of deltas (indices, original values). Names that someone else put on its list stay."""
    listed = set(getattr(model, _DDP_LIST, ())) - set(getattr(model, _DDP_OURS, ()))
    ours = [name for name, _ in model.named_buffers() if ".deltas." in name]
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            ours += [f"{name}.{key}" for key in module.storage.names if getattr(module, key) is not None]
    for attribute, names in ((_DDP_OURS, ours), (_DDP_LIST, sorted(listed.union(ours)))):
        if names:
            setattr(model, attribute, names)
        else:  # a plain model carries nothing of ours
            model.__dict__.pop(attribute, None)


def check_loaded_keys(model: nn.Module, incompatible: Any) -> None:
    """A checkpoint of a tuned model holds its trainables only: frozen keys are not missing, trainables must not be."""
    in_place = {key for key, _, _, held in owners(model) if held.active is not None and held.active not in held.fresh}
    trainable = {
        key
        for key in incompatible.missing_keys
        if ".deltas." in key or key in in_place or key.startswith(f"{SCHEDULES}.")
    }
    if trainable:
        raise RuntimeError(
            f"the checkpoint lacks trained tensors of this model, first {sorted(trainable)[0]!r}; it was made with "
            "another method or other targets: tune the model as it was tuned then, or inlay.load the adapter"
        )
    incompatible.missing_keys.clear()


def begin_loaded(model: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before a checkpoint is loaded: what it holds of the tensors that a schedule may choose gets memory of its own."""
    for key, module, name, held in owners(model):
        if held.active is not None and f"{prefix}{key}" in state_dict:
            begin(held, held.active, module._parameters.get(name))


def check_in_place(model: nn.Module) -> None:
    """Raise ValueError if a base weight that a delta writes into is gathered anew for each use."""
    for name, module in tuned_linears(model).items():
        if any(delta.in_place for delta in module.pieces().values()) and is_sharded(module.weight):
            raise ValueError(
                f'{name}: update="in_place" writes into the base weight, and FSDP2 gathers another copy of it for the '
                'backward; use update="additive" with FSDP2, or DDP'
            )
