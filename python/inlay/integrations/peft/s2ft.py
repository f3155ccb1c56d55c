"""The PEFT layer and tuner of S²FT: containers and bookkeeping are PEFT's, everything computed is inlay's delta."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...bases.linear import is_conv1d, out_in_view
from ...bases.quantized import QuantizedLinear
from ...deltas import Delta, SubmatrixDelta
from ...deltas.submatrix import Side
from ...model import sample_weights
from ...nn.blocks import install_blocks
from ...nn.mixed import unmix
from ...nn.partial import install_partial_backprop
from ...nn.tuned_linear import is_watched
from ...ops.swiglu import swiglu
from ...targets import is_linear, resolve
from ...tune import adopt_bitsandbytes, check_tunable
from ..trl import watch
from .base import OnQuantized, fused_base, refuse_tuned, weight_like
from .config import PEFT_TYPE, S2FTConfig
from .internals import BaseTuner, BaseTunerLayer, BufferDict, check_adapters_to_merge, register


class HeldDelta(SubmatrixDelta):
    """A submatrix delta whose tensors are where PEFT looks for them: in a layer's containers, by adapter name."""

    def __init__(self, layer: S2FTLinear, name: str, side: Side) -> None:
        Delta.__init__(self, layer.in_features, layer.out_features)  # not SubmatrixDelta's: the tensors exist
        self.side = side
        self.holder = (layer, name)

    @property
    def s2ft_values(self) -> nn.Parameter:
        layer, name = self.holder
        return layer.s2ft_values[name]

    @property
    def s2ft_indices(self) -> Tensor:
        layer, name = self.holder
        return layer.s2ft_indices[name]


class S2FTLinear(nn.Module, BaseTunerLayer):
    """A linear and the S²FT adapters on it.

    Args:
        base_layer: ``nn.Linear``, Conv1D or inlay's quantized linear; called, or handed to the op where that is the
            same. Its weight stays frozen.
        adapter_name, indices, side: the first adapter; see :class:`inlay.deltas.SubmatrixDelta`.
        where: the linear's name, for errors.
    """

    adapter_layer_names = ("s2ft_values",)
    other_param_names = ("s2ft_indices", "s2ft_deltas", "s2ft_unloaded")

    def __init__(self, base_layer: nn.Module, adapter_name: str, indices: Tensor, side: Side, where: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        out_features, in_features = weight_like(base_layer).shape
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.s2ft_values = nn.ParameterDict()
        self.s2ft_indices = BufferDict(persistent=True)
        self.s2ft_deltas: dict[str, HeldDelta] = {}
        self.s2ft_unloaded: dict[str, bool] = {}  # adapters whose channels are still to come from a file
        self.s2ft_originals: list[tuple[str, Tensor]] = []  # what merging overwrote, in that order
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, indices, side, where)

    def update_layer(
        self, adapter_name: str, indices: Tensor, side: Side, where: str, inference_mode: bool = False
    ) -> None:
        """Add an adapter, with ``ΔW = 0``."""
        fresh = SubmatrixDelta(weight_like(self.base_layer), indices, side, where)
        self.s2ft_values[adapter_name] = fresh.s2ft_values
        self.s2ft_indices[adapter_name] = fresh.s2ft_indices
        self.s2ft_deltas[adapter_name] = HeldDelta(self, adapter_name, side)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def watched(self) -> bool:
        """True if hooks rely on calls of this module; fused blocks then call it."""
        return is_watched(self)

    def applied(self) -> list[HeldDelta]:
        """The deltas that a forward adds to the base: none where they are disabled, or merged into it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        names = [name for name in self.active_adapters if name in self.s2ft_deltas]
        for name in names:
            if name in self.s2ft_unloaded:
                raise RuntimeError(
                    f"adapter {name!r} was made from a saved config whose strategy needs calibration data: wanted its "
                    "saved channels, got none; load it with PeftModel.from_pretrained or load_adapter, or make a new "
                    "S2FTConfig(..., calibration=batches)"
                )
        return [self.s2ft_deltas[name] for name in names]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        deltas = self.applied()
        found = fused_base(self.base_layer) if len(deltas) == 1 and not (args or kwargs) else None
        if found is not None:
            base, tensors = found
            return deltas[0].linear(x, base, *tensors)
        y = self.base_layer(x, *args, **kwargs)
        for delta in deltas:
            y = delta.add_to(y, x)
        return y

    def forward_gated(self, gate: Tensor, up: Tensor, act: str) -> Tensor:
        """``self(act(gate) * up)``: a delta that can rebuild its input saves none of it."""
        deltas = self.applied()
        found = fused_base(self.base_layer) if len(deltas) == 1 else None
        if found is None:
            return self(swiglu(gate, up, act))
        base, tensors = found
        return deltas[0].gated_linear(gate, up, act, base, *tensors)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``ΔW``, fp32, in the layout of the base weight."""
        delta = self.s2ft_deltas[adapter].weight_delta()
        return delta.t() if is_conv1d(self.base_layer) else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters into the base weight, each rounded once; :meth:`unmerge` restores the very bits."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.s2ft_deltas:
                continue
            delta, weight = self.s2ft_deltas[name], out_in_view(self.base_layer)
            merged = delta.merge_into(weight)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"the merged weight holds NaN or infinity; adapter {name!r} seems to be broken")
            self.s2ft_originals.append((name, weight.index_select(delta.dim, delta.s2ft_indices)))
            weight.copy_(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        while self.s2ft_originals:
            name, original = self.s2ft_originals.pop()
            delta = self.s2ft_deltas[name]
            out_in_view(self.base_layer).index_copy_(delta.dim, delta.s2ft_indices, original)
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move, but keep the values in fp32 whatever the base's dtype is."""
        if adapter_name in self.s2ft_values and self.s2ft_values[adapter_name].device.type != "meta":
            device = device if device is not None else self.base_layer.weight.device
            self.s2ft_values[adapter_name] = self.s2ft_values[adapter_name].to(device)
            self.s2ft_indices[adapter_name] = self.s2ft_indices[adapter_name].to(device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "s2ft." + super().__repr__()


class S2FTQuantizedLinear(OnQuantized, S2FTLinear):
    """The same on inlay's quantized linears."""


class S2FTModel(BaseTuner):
    """PEFT's tuner for :class:`S2FTConfig`: chooses the channels of all targets, then puts a layer on each."""

    prefix: str = "s2ft_"
    tuner_layer_cls = S2FTLinear
    target_module_mapping: dict[str, list[str]] = {}  # defaults depend on the model's modules, see _prepare_model

    chosen: tuple[S2FTConfig, dict[str, Tensor]] | None = None
    call_watch: Any = None

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        self.chosen = None
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
        indices, side = self._indices_of(peft_config, current_key), peft_config.method.side_of(current_key)
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

    def _indices_of(self, config: S2FTConfig, key: str) -> Tensor:
        """The channels of the target ``key``, chosen together with those of all others at the first of them."""
        if self.chosen is None or self.chosen[0] is not config or key not in self.chosen[1]:
            self.chosen = config, self._choose(config, key)
        return self.chosen[1][key]

    def _choose(self, config: S2FTConfig, key: str) -> dict[str, Tensor]:
        method = config.method
        if config.loaded and needs_data(config):
            method = dataclasses.replace(method, strategy="random")  # of the right size, until the file is read
        with bases_in_place(self.model):
            names = [name for name, _ in self.model.named_modules() if name and self._check_target(config, name)]
            names = names if key in names else [*names, key]
            for name in names:
                check_target(self.model, name)
            assert config.inlay is not None
            config.inlay["base_sample"] = config.inlay["base_sample"] or sample_weights(self.model, names)
            return method.choose(self.model, names, config.held_calibration)

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
        for module in plain.modules():
            unmix(module)
        if self.call_watch is not None:
            self.call_watch.remove()
        return plain

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, module in model.named_modules():
            if isinstance(module, S2FTLinear) and f"{name}.s2ft_indices.{adapter_name}" in remapped:
                module.s2ft_unloaded.pop(adapter_name, None)
        return remapped


def creates_on_meta() -> bool:
    """True inside PEFT's ``low_cpu_mem_usage=True``, where a probe could not run: blocks then stay as they are."""
    return nn.Linear(1, 1).weight.device.type == "meta"


def needs_data(config: S2FTConfig) -> bool:
    """Whether choosing channels would need calibration data that ``config`` does not hold."""
    return config.held_calibration is None and config.strategy not in ("random", "weight")


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
