"""``tune``: the front door. Turns a model into one whose chosen linears carry trainable deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from .bases import BaseConfig, QuantizedWeight, convert_model
from .bases.linear import computes_linear
from .coverage import warn_about_experts
from .deltas import Delta
from .fingerprint import fingerprint
from .methods import Calibration, Method
from .model import TuneState, disabled, make_tuned, sample_weights, state_of
from .nn.blocks import install_blocks
from .nn.head import install_head
from .nn.tuned_linear import TunedLinear
from .nn.tuned_quantized import tuned
from .nn.use_check import check_by_probe
from .nn.whole import add_whole, check_whole, keys_of
from .task_head import whole_names, without_whole

DEFAULT_ADAPTER = "default"
_T = TypeVar("_T")


def tune(
    model: nn.Module,
    method: Method,
    *,
    base: str | BaseConfig | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
    calibration: Calibration | None = None,
    fused_blocks: bool = True,
    fused_loss: bool = True,
) -> nn.Module:
    """Freeze ``model`` and give the linears ``method`` targets a trainable delta. No logit changes before training.

    Changes ``model`` in place and returns the same object, which keeps its class and so works in any trainer, and
    gains ``print_trainable_parameters``, an adapter-only ``save_pretrained``, ``set_adapter`` and the like.

    Args:
        model: any module with ``nn.Linear`` or transformers ``Conv1D`` submodules, weights loaded, dense or quantized
            by inlay or bitsandbytes (whose linears become inlay's, with the same bytes).
        method: what to train, e.g. ``inlay.S2FT(ratio=0.03)``.
        base: "nf4", "fp4", "int8" or a :class:`inlay.BaseConfig`: quantize the frozen linears first (QLoRA). None
            leaves each as it is. Then the model changes by exactly the quantization error.
        adapter_name: name of the new adapter, which becomes the active one.
        calibration: batches of forward arguments, for methods that select by activation or gradient.
        fused_blocks: replace norms, gated MLPs and attention by the fused modules that partial backpropagation
            needs, where they are proven to compute the same. False leaves every other module as it is.
        fused_loss: compute the causal-LM loss without keeping logits, where it is proven to be the model's loss.
            In training mode ``outputs.logits`` is then not available; False brings it back.

    Raises:
        TypeError: ``method`` is not a method config.
        ValueError: a target matches nothing, cannot be tuned, is shared or tied, or is tuned already; a module of
            ``modules_to_save`` is not there, quantized or tuned.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method: wanted a config such as inlay.S2FT(ratio=0.03), got {type(method).__name__}")
    state = state_of(model)
    if state is not None and adapter_name in state.methods:
        raise ValueError(
            f"this model is tuned already with an adapter {adapter_name!r}; pass another adapter_name, "
            "or inlay.merge it first"
        )
    adopt_bitsandbytes(model)
    config = None if base is None else BaseConfig.of(base)
    with nullcontext() if state is None else disabled(model):  # choose by the base, whatever else is tuned
        builders = method.place(model, calibration)
    method, builders, whole = split_whole(model, method, builders)
    for name in builders:
        check_tunable(model, name)
    check_by_probe(model, builders)
    deltas = {name: build(model.get_submodule(name)) for name, build in builders.items()}
    check_base_fits(model, method, deltas, config)
    sample, marks = sample_weights(model, list(deltas)), fingerprint(model, list(deltas), whole)
    warn_about_experts(model)
    if config is not None:
        method.quantize(model, config.leaving(whole), deltas)
    return attach(
        model,
        method,
        deltas,
        adapter_name,
        sample=sample,
        marks=marks,
        base=config,
        whole=dict.fromkeys(whole),
        fused_blocks=fused_blocks,
        fused_loss=fused_loss,
    )


def split_whole(
    model: nn.Module, method: Method, builders: Mapping[str, _T]
) -> tuple[Method, dict[str, _T], list[str]]:
    """What trains whole and what gets a delta: the method with the former's names, the latter, the former's tensors."""
    names = whole_names(model, method)
    method = replace(method, modules_to_save=names) if names else method
    return method, without_whole(builders, names), keys_of(model, names)


def attach(
    model: nn.Module,
    method: Method,
    deltas: dict[str, Delta],
    adapter_name: str,
    *,
    sample: dict[str, list[float]],
    marks: dict[str, Any] | None = None,
    base: BaseConfig | None = None,
    whole: Mapping[str, torch.Tensor | None] | None = None,
    as_base: Sequence[str] = (),
    fused_blocks: bool = True,
    fused_loss: bool = True,
) -> nn.Module:
    """Put built ``deltas`` on the linears they are named for; the part ``tune`` and ``load`` share.

    ``whole``: the tensors that train whole, and ``as_base``; see :func:`inlay.nn.whole.add_whole`.
    """
    check_whole(model, adapter_name, whole or {})
    for name, delta in deltas.items():  # before anything changes
        if isinstance(module := model.get_submodule(name), TunedLinear):
            module.check_room(adapter_name, delta)
    state = state_of(model)
    if state is None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        state = TuneState(base_sample=sample, fingerprint=marks or {}, base=base)
    wrapped = {name: _wrap(model, name) for name in deltas}
    for name, delta in deltas.items():
        wrapped[name].add_delta(adapter_name, delta)
    state.methods[adapter_name] = method
    make_tuned(model, state)
    if fused_blocks:
        install_blocks(model)
    add_whole(model, adapter_name, whole or {}, as_base)
    if fused_loss:
        install_head(model)
    model.set_adapter(adapter_name)
    return model


def adopt_bitsandbytes(model: nn.Module) -> None:
    """Give linears that bitsandbytes quantized our class, with their bytes, and take over from its quantizer."""
    if convert_model(model) and getattr(model, "hf_quantizer", None) is not None:
        from .integrations.quantizer import adopt

        adopt(model)


def check_base_fits(model: nn.Module, method: Method, deltas: dict[str, Delta], base: BaseConfig | None) -> None:
    """Raise ValueError if a delta cannot live on the base it would get; nothing has changed yet."""
    if method.needs_base and base is None:
        raise ValueError(f'{method.needs_base} chooses the quantized base: pass base="nf4" or an inlay.BaseConfig')
    chosen = base.names(model) if base is not None else {}
    for name, delta in deltas.items():
        is_packed = isinstance(model.get_submodule(name), QuantizedWeight)
        if delta.needs_quantized_base and not is_packed and name not in chosen:
            raise ValueError(
                f'{name}: keep="exact" is for quantized bases, and this one is dense; pass base="nf4", '
                'or use update="in_place"'
            )
        if delta.in_place and (is_packed or name in chosen):
            raise ValueError(
                f'{name}: update="in_place" writes into a dense weight, and this base is quantized; use "additive"'
            )
        if method.needs_base and is_packed:
            raise ValueError(
                f"{name}: {method.needs_base} starts from the dense weight, and this one is quantized already"
            )


def check_tunable(model: nn.Module, name: str, loaded: bool = True) -> None:
    """Raise ValueError if a delta on the linear ``name`` would do nothing or something wrong, or has no weight yet
    where the model should be ``loaded``."""
    module = model.get_submodule(name)
    if isinstance(module, TunedLinear | QuantizedWeight):
        return
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise ValueError(f"{name}: wanted a dense [out, in] weight, got {type(module).__name__} without one")
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"{name}: its weight is computed from others (a parametrization or pruning); make it a plain Parameter, "
            "with torch.nn.utils.parametrize.remove_parametrizations or prune.remove, before tune"
        )
    if loaded and weight.device.type == "meta":
        raise ValueError(f"{name} is on the meta device: load its weights before tune")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(
            f"{name}: wanted a weight of float32, bfloat16, float16 or float64, got {weight.dtype} "
            f"({type(module).__name__}); this base was quantized by another library: load the dense model"
        )
    if not computes_linear(module):
        raise ValueError(
            f"{name}: {type(module).__name__} is a linear by class and computes something else than x·Wᵀ + b; add it "
            "to exclude_modules"
        )
    _check_parent(model, name)
    _check_shared(model, name, module)


def _check_parent(model: nn.Module, name: str) -> None:
    """Some torch modules read their linears' ``.weight`` themselves, bypassing forward: a delta would do nothing."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        parent = model.get_submodule(".".join(parts[:depth])) if depth else model
        if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            raise ValueError(
                f"{name} belongs to a {type(parent).__name__}, which reads its weights without calling it, so that a "
                "delta there would have no effect; add it to exclude_modules"
            )


def _check_shared(model: nn.Module, name: str, module: nn.Module) -> None:
    """A merge into a weight that something else reads too would change both."""
    others = [
        f"{other}.{key}"
        for other, holder in model.named_modules(remove_duplicate=False)
        for key, parameter in holder.named_parameters(recurse=False, remove_duplicate=False)
        if other != name and (parameter is module.weight or _same_memory(parameter, module.weight))
    ]
    if others:
        raise ValueError(
            f"{name}.weight is shared with {others[0]} (tied weights or a module used twice): tuning one would tune "
            "both on merge; untie them or add it to exclude_modules"
        )


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.device == other.device and one.device.type != "meta" and one.data_ptr() == other.data_ptr() != 0


def _wrap(model: nn.Module, name: str) -> TunedLinear:
    module = model.get_submodule(name)
    if isinstance(module, TunedLinear):
        return module
    wrapped = tuned(module)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, leaf, wrapped)
    return wrapped
