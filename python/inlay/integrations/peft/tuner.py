"""PEFT's tuner for S²FT: chooses the channels of all targets, puts a layer on each, undoes both."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...adapters.load import check_sample
from ...bases.quantized import QuantizedLinear
from ...install import adopt_bitsandbytes, check_tunable
from ...nn.blocks import install_blocks
from ...nn.mixed import unmix
from ...nn.partial import install_partial_backprop, remove_partial_backprop
from ...pieces.linear.submatrix import Side
from ...state import sample_weights
from ...targets import is_linear, resolve
from ...task_head import task_head
from ..trl import watch
from .base import refuse_tuned
from .config import PEFT_TYPE, S2FTConfig
from .internals import BaseTuner, register
from .layer import S2FTLinear, S2FTQuantizedLinear


class S2FTModel(BaseTuner):
    """PEFT's tuner for :class:`S2FTConfig`: chooses the channels of all targets, then puts a layer on each."""

    prefix: str = "s2ft_"
    tuner_layer_cls = S2FTLinear
    target_module_mapping: dict[str, list[str]] = {}  # defaults depend on the model's modules, see _prepare_model

    chosen: tuple[S2FTConfig, dict[str, tuple[Tensor, Side]]] | None = None
    call_watch: Any = None

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        self.chosen = None
        # Where DDP looks on the PeftModel, which forwards here: what is the same on all ranks needs no broadcast.
        self._ddp_params_and_buffers_to_ignore = [f"base_model.model.{name}" for name in same_everywhere(model)]
        install_partial_backprop(model)
        if self.call_watch is None:
            self.call_watch = watch(model)

    def _prepare_adapter_config(self, peft_config: S2FTConfig, model_config: dict) -> S2FTConfig:
        return peft_config

    def _prepare_model(self, peft_config: S2FTConfig, model: nn.Module) -> None:
        adopt_bitsandbytes(model)
        if peft_config.target_modules is None:
            method = peft_config.method
            with bases_in_place(model):
                names = resolve(
                    model,
                    None,
                    exclude_modules=method.exclude_modules,
                    layers_to_transform=method.layers_to_transform,
                )
            peft_config.target_modules = set(names)
        warn_about_head(model, peft_config)
        if peft_config.fused_blocks and not creates_on_meta():
            install_blocks(model)

    def _create_and_replace(
        self,
        peft_config: S2FTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        indices, side = self._channels_of(peft_config, current_key)
        if isinstance(target, S2FTLinear):
            layer = target
            layer.update_layer(adapter_name, indices, side, current_key, peft_config.inference_mode)
        else:
            kind = S2FTQuantizedLinear if isinstance(target, QuantizedLinear) else S2FTLinear
            layer = kind(target, adapter_name, indices, side, current_key)
            if adapter_name not in self.active_adapters:  # PEFT: a further adapter does not train before it is active
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        if peft_config.loaded and needs_data(peft_config):
            layer.s2ft_unloaded[adapter_name] = True

    def _channels_of(self, config: S2FTConfig, key: str) -> tuple[Tensor, Side]:
        """The channels of the target ``key``, chosen together with those of all others at the first of them, and their
        side."""
        if self.chosen is None or self.chosen[0] is not config or key not in self.chosen[1]:
            self.chosen = config, self._choose(config, key)
        return self.chosen[1][key]

    def _choose(self, config: S2FTConfig, key: str) -> dict[str, tuple[Tensor, Side]]:
        method = config.method
        if config.loaded and needs_data(config):
            method = dataclasses.replace(method, strategy="random")  # of the right size, until the file is read
        with bases_in_place(self.model):
            names = [name for name, _ in self.model.named_modules() if name and self._check_target(config, name)]
            names = names if key in names else [*names, key]
            for name in names:
                check_target(self.model, name)
            recognize_base(self.model, config, names)
            indices, sides = method.choose(self.model, names, config.held_calibration), method.sides(self.model, names)
        return {name: (indices[name], sides[name]) for name in names}

    def _check_target(self, config: S2FTConfig, name: str) -> bool:
        return bool(self._check_target_module_exists(config, name))

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        install_partial_backprop(self.model)

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        super().set_requires_grad(*args, **kwargs)
        install_partial_backprop(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT drops ``adapter_names`` for methods that cannot mix adapters in a batch; refuse instead."""
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError("adapter_names: S2FT wants one adapter for a whole batch; call set_adapter")
        yield

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        plain = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_partial_backprop(plain)
        for module in plain.modules():
            unmix(module)
        if self.call_watch is not None:
            self.call_watch.remove()
            self.call_watch = None
        return plain

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, layer in model.named_modules():
            if not isinstance(layer, S2FTLinear) or adapter_name not in layer.s2ft_deltas:
                continue
            keys = {leaf: f"{name}.{leaf}.{adapter_name}" for leaf in ("s2ft_values", "s2ft_indices")}
            held = {leaf: remapped[key] for leaf, key in keys.items() if key in remapped}
            if held:  # else PEFT says that the file lacks this layer
                remapped |= {keys[leaf]: tensor for leaf, tensor in layer.checked(adapter_name, held, name).items()}
                layer.s2ft_unloaded.pop(adapter_name, None)
        return remapped


def warn_about_head(model: nn.Module, config: S2FTConfig) -> None:
    """Say that a task's head stays as it is: PEFT trains and saves one by the task type, or where it is named."""
    head = task_head(model)
    if head and not config.modules_to_save and not config.loaded and config.task_type in (None, "FEATURE_EXTRACTION"):
        warnings.warn(
            f"the head of this {type(model).__name__} ({', '.join(head)}) stays frozen and is not saved: pass "
            f"modules_to_save={head} or a task_type such as SEQ_CLS, unless it has been trained",
            stacklevel=2,
        )


def same_everywhere(model: nn.Module) -> list[str]:
    """Names of the channels' indices, which DDP would send at each forward, and of packed weights."""
    names = [name for name, _ in model.named_buffers() if ".s2ft_indices." in name]
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            names += [f"{path}.{key}" for key in module.storage.names if getattr(module, key) is not None]
    return names


def creates_on_meta() -> bool:
    """True inside PEFT's ``low_cpu_mem_usage=True``, where a probe could not run: blocks then stay as they are."""
    return nn.Linear(1, 1).weight.device.type == "meta"


def needs_data(config: S2FTConfig) -> bool:
    """Whether choosing channels would need calibration data that ``config`` does not hold."""
    return config.held_calibration is None and config.strategy not in ("random", "weight")


def recognize_base(model: nn.Module, config: S2FTConfig, names: list[str]) -> None:
    """Note a few base weights in a new adapter's config; ValueError if they are not those in a saved one's."""
    assert config.inlay is not None  # filled in by the config itself
    if not config.loaded:
        config.inlay["base_sample"] = sample_weights(model, names)
    for name in set(names) & set(config.inlay["base_sample"]):
        try:
            check_sample(name, config.inlay["base_sample"][name], model.get_submodule(name).weight)
        except ValueError as error:
            raise ValueError(f"{error} (under PEFT: empty inlay['base_sample'] of the config)") from None


def check_target(model: nn.Module, name: str) -> None:
    """Raise ValueError if a delta on ``name`` would do nothing or something wrong."""
    module = model.get_submodule(name)
    refuse_tuned(module, name)
    if not is_linear(module):
        raise ValueError(f"{name}: wanted an nn.Linear or Conv1D, got {type(module).__name__}; narrow target_modules")
    check_tunable(model, name)


@contextmanager
def bases_in_place(model: nn.Module) -> Iterator[None]:
    """Within this context the linears that carry adapters are the linears they were: what selectors look at."""
    held = {name: module for name, module in model.named_modules() if isinstance(module, S2FTLinear)}
    try:
        for name, module in held.items():
            model.set_submodule(name, module.base_layer)
        yield
    finally:
        for name, module in held.items():
            model.set_submodule(name, module)


register(PEFT_TYPE, S2FTConfig, S2FTModel)
