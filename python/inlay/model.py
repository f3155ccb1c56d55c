"""What a tuned model is: the same object and class, plus adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .bases import BaseConfig, QuantizedWeight
from .integrations.trl import watch
from .methods import Method
from .nn.head import remove_head
from .nn.mixed import Mixed, mix, unmix
from .nn.partial import install_partial_backprop, remove_partial_backprop
from .nn.tuned_linear import TunedLinear
from .nn.use_check import check_at_first_training_forward
from .nn.whole import (
    active_whole,
    owners,
    remove_whole,
    restore_whole,
    switch_whole,
    train_whole,
)
from .sharding import any_sharded, is_sharded

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
    """

    methods: dict[str, Method] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    base_sample: dict[str, list[float]] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    base: BaseConfig | None = None
    handles: list[RemovableHandle] = field(default_factory=list)


def state_of(model: nn.Module) -> TuneState | None:
    """The tune state of ``model``, or None if it is not tuned."""
    return getattr(model, STATE_ATTRIBUTE, None)


def require_state(model: nn.Module, what: str) -> TuneState:
    """The tune state, or TypeError saying that ``what`` wants a tuned model."""
    state = state_of(model)
    if state is None:
        raise TypeError(f"{what}: wanted a model from inlay.tune or inlay.load, got a plain {type(model).__name__}")
    return state


def tuned_linears(model: nn.Module) -> dict[str, TunedLinear]:
    """Every TunedLinear by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TunedLinear)}


def sample_weights(model: nn.Module, names: list[str], every: bool = False) -> dict[str, list[float]]:
    """Some evenly spaced values of a few (or all) of the named weights, in fp32."""
    step = 1 if every else max(1, len(names) // _SAMPLED_WEIGHTS)
    sample = {}
    for name in names[::step][: None if every else _SAMPLED_WEIGHTS]:
        weight = model.get_submodule(name).weight
        if weight.device.type == "meta":
            continue
        sample[name] = sample_of(weight)
    return sample


def sample_of(weight: Tensor) -> list[float]:
    """Some evenly spaced values of ``weight``, in fp32."""
    flat = weight.detach().reshape(-1)
    positions = torch.arange(_SAMPLED_VALUES, device=flat.device) * max(1, flat.numel() // _SAMPLED_VALUES)
    return flat[positions.clamp(max=flat.numel() - 1)].float().tolist()


class TunedModel(Mixed):
    """Methods a tuned model gains. ``tune`` mixes this into the model's own class."""

    inlay_state: TuneState

    def print_trainable_parameters(self) -> None:
        """Print trainable and total parameter counts, PEFT's line."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def print_tuned_modules(self) -> None:
        """Print every kind of weight with its base and how many of it are tuned; see :mod:`inlay.coverage`."""
        from .coverage import coverage_table

        print(coverage_table(self))

    def save_pretrained(
        self, save_directory: str, is_main_process: bool = True, state_dict: dict[str, Tensor] | None = None, **kwargs
    ) -> None:
        """Write the active adapter to ``save_directory``; see :func:`inlay.adapters.save_adapter`."""
        from .adapters.save import save_adapter

        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub=True: inlay writes adapters to disk and contacts no service; save to a folder, then "
                "upload it with huggingface_hub's upload_folder"
            )
        if is_main_process or (state_dict is None and any_sharded(self)):  # which every process has to gather
            save_adapter(self, save_directory, state_dict=state_dict)

    def train(self, mode: bool = True) -> nn.Module:
        """As ``nn.Module.train``; ValueError if an in-place delta's base has been sharded since."""
        if mode:
            check_in_place(self)
        return super().train(mode)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make these adapters the active, trainable ones; the others stay loaded, frozen."""
        state = require_state(self, "set_adapter")
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        for name in names:
            if name not in state.methods:
                raise ValueError(f"no adapter {name!r}; there are {sorted(state.methods)}")
        switch_whole(self, names)
        train_whole(self, names)
        state.active = names
        for module in tuned_linears(self).values():
            module.active = names
            for name, delta in module.deltas.items():
                delta.requires_grad_(name in names)
            module.sync()
        install_partial_backprop(self)
        keep_from_ddp(self)

    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(require_state(self, "active_adapters").active)

    def disable_adapters(self) -> None:
        """Behave as the base model until :meth:`enable_adapters` or :meth:`set_adapter`."""
        switch_whole(self, ())
        for module in tuned_linears(self).values():
            module.active = ()
            module.sync()

    def enable_adapters(self) -> None:
        """Undo :meth:`disable_adapters`."""
        switch_whole(self, require_state(self, "enable_adapters").active)
        for module in tuned_linears(self).values():
            module.active = require_state(self, "enable_adapters").active
            module.sync()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter that is not active."""
        state = require_state(self, "delete_adapter")
        if adapter_name in state.active:
            raise ValueError(f"adapter {adapter_name!r} is active; set_adapter another one first")
        if state.methods.pop(adapter_name, None) is None:
            raise ValueError(f"no adapter {adapter_name!r}; there are {sorted(state.methods)}")
        for module in tuned_linears(self).values():
            if adapter_name in module.deltas:
                module.remove_delta(adapter_name)
        remove_whole(self, adapter_name)

    def load_adapter(self, directory: str, adapter_name: str = "default", **kwargs) -> None:
        """Add the adapter in ``directory`` under ``adapter_name``; see :func:`inlay.load`."""
        from .adapters.load import load

        load(self, directory, name=adapter_name, **kwargs)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add the weighted sum of ``adapters``; see :func:`inlay.adapters.add_weighted_adapter`."""
        from .adapters.combine import add_weighted_adapter

        add_weighted_adapter(self, adapters, weights, adapter_name)

    def hotswap_adapter(self, directory: str, adapter_name: str = "default") -> None:
        """Put the values of the adapter in ``directory`` into a loaded one; see :func:`inlay.adapters.hotswap`."""
        from .adapters.load import hotswap

        hotswap(self, directory, adapter_name)


def make_tuned(model: nn.Module, state: TuneState) -> nn.Module:
    """Give ``model`` its tune state and the methods of :class:`TunedModel`."""
    if state_of(model) is None:
        setattr(model, STATE_ATTRIBUTE, state)
        mix(model, TunedModel)
        handle = model.register_load_state_dict_post_hook(_check_loaded_keys)
        state.handles += [handle, watch(model), check_at_first_training_forward(model, tuned_linears)]
    return model


def make_plain(model: nn.Module) -> nn.Module:
    """Undo :func:`make_tuned` and every mixin on a submodule."""
    state = require_state(model, "make_plain")
    for handle in state.handles:
        handle.remove()
    remove_head(model)
    remove_partial_backprop(model)
    for module in model.modules():
        while isinstance(module, Mixed):
            unmix(module)
    keep_from_ddp(model)
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


def _check_loaded_keys(model: nn.Module, incompatible: Any) -> None:
    """A checkpoint of a tuned model holds its trainables only: frozen keys are not missing, trainables must not be."""
    in_place = {key for key, _, _, held in owners(model) if held.active is not None}
    trainable = {key for key in incompatible.missing_keys if ".deltas." in key or key in in_place}
    if trainable:
        raise RuntimeError(
            f"the checkpoint lacks trained tensors of this model, first {sorted(trainable)[0]!r}; it was made with "
            "another method or other targets: tune the model as it was tuned then, or inlay.load the adapter"
        )
    incompatible.missing_keys.clear()


def check_in_place(model: nn.Module) -> None:
    """Raise ValueError if a base weight that a delta writes into is gathered anew for each use."""
    for name, module in tuned_linears(model).items():
        if any(delta.in_place for delta in module.deltas.values()) and is_sharded(module.weight):
            raise ValueError(
                f'{name}: update="in_place" writes into the base weight, and FSDP2 gathers another copy of it for the '
                'backward; use update="additive" with FSDP2, or DDP'
            )


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context ``model`` behaves as its base model."""
    require_state(model, "disabled")
    before = {module: module.active for module in tuned_linears(model).values()}
    whole = active_whole(model)
    model.disable_adapters()
    try:
        yield model
    finally:
        restore_whole(model, whole)
        for module, active in before.items():
            module.active = active
            module.sync()
