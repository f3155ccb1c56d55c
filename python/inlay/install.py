"""``install``: put built pieces on a model. What ``tune``, ``load``, the sum of adapters and estimates share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .bases import BaseConfig, QuantizedWeight, convert_model
from .bases.linear import computes_linear
from .integrations.trl import watch
from .methods import Method
from .nn.blocks import install_blocks
from .nn.experts import hold_experts, proven_layout
from .nn.head import install_head
from .nn.holder import Holder
from .nn.tuned_linear import TunedLinear
from .nn.tuned_output import hold_outputs
from .nn.tuned_quantized import tuned
from .nn.use_check import check_at_first_training_forward
from .nn.whole import add_whole, check_whole
from .pieces import Piece, Whole
from .pieces.lookup import lookup_of
from .schedules import SCHEDULES, Schedule, follow
from .sites import ExpertsSite, LinearSite, site_of
from .state import (
    STATE_ATTRIBUTE,
    TuneState,
    activate,
    begin_loaded,
    check_loaded_keys,
    require_state,
    state_of,
    tuned_linears,
)
from .ties import check_not_whole, tied_pieces

DEFAULT_ADAPTER = "default"


def install(
    model: nn.Module,
    method: Method,
    pieces: Mapping[str, Piece],
    adapter_name: str,
    *,
    sample: dict[str, list[float]],
    marks: dict[str, Any] | None = None,
    base: BaseConfig | None = None,
    whole: Mapping[str, Whole] | None = None,
    schedule: Schedule | None = None,
    fused_blocks: bool = True,
    fused_loss: bool = True,
) -> nn.Module:
    """Put built ``pieces`` on the modules they are named for, as adapter ``adapter_name``, and make it the active one.

    A piece on a weight that several modules share acts on all of them.

    ``whole``: how each tensor that trains whole is held, by state-dict key.
    """
    check_whole(model, adapter_name, whole or {})
    check_not_whole(model, pieces, whole or {})
    pieces = {**pieces, **tied_pieces(model, pieces)}
    for name, piece in pieces.items():  # before anything changes
        if isinstance(module := model.get_submodule(name), Holder):
            module.check_room(adapter_name, piece)
    state = state_of(model)
    if state is None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        state = TuneState(base_sample=sample, fingerprint=marks or {}, base=base)
    linears = [name for name in pieces if isinstance(site_of(model, name), LinearSite)]
    held = {name: _wrap(model, name) for name in linears}
    state.methods[adapter_name] = method
    _make_tuned(model, state)
    if fused_blocks:
        install_blocks(model)
    for name, piece in pieces.items():
        holder = held[name] if name in held else _hold(model, name)
        holder.add_delta(adapter_name, piece)
    if fused_loss:
        install_head(model)
    add_whole(model, adapter_name, whole or {})
    activate(model, (adapter_name,))
    if schedule is not None:
        _add_schedule(model, schedule, adapter_name)
    return model


def _hold(model: nn.Module, name: str) -> Holder:
    module = model.get_submodule(name)
    return hold_experts(module, name) if isinstance(site_of(model, name), ExpertsSite) else hold_outputs(module)


def _add_schedule(model: nn.Module, schedule: Schedule, adapter_name: str) -> None:
    if SCHEDULES not in model._modules:
        model.add_module(SCHEDULES, nn.ModuleDict())
        handles = require_state(model, "install").handles
        handles.append(model.register_forward_pre_hook(follow, with_kwargs=True))
        handles.append(model.register_load_state_dict_pre_hook(begin_loaded))
    device = next(model.parameters()).device
    held: Any = model._modules[SCHEDULES]
    held[adapter_name] = schedule.to(device)


def _make_tuned(model: nn.Module, state: TuneState) -> None:
    """Give ``model`` its tune state, and the hooks of every tuned model."""
    if state_of(model) is None:
        setattr(model, STATE_ATTRIBUTE, state)
        handle = model.register_load_state_dict_post_hook(check_loaded_keys)
        state.handles += [handle, watch(model), check_at_first_training_forward(model, tuned_linears)]
        state.handles.append(model.register_forward_pre_hook(state.padding_free.drop, with_kwargs=True))


def adopt_bitsandbytes(model: nn.Module) -> None:
    """Give linears that bitsandbytes quantized our class, with their bytes, and take over from its quantizer."""
    if convert_model(model) and getattr(model, "hf_quantizer", None) is not None:
        from .integrations.quantizer import adopt

        adopt(model)


def check_base_fits(model: nn.Module, method: Method, pieces: Mapping[str, Piece], base: BaseConfig | None) -> None:
    """Raise ValueError if a piece cannot live on the base it would get, or with what shares its weight; nothing has
    changed yet."""
    tied_pieces(model, pieces)
    if method.needs_base and base is None:
        raise ValueError(f'{method.needs_base} chooses the quantized base: pass base="nf4" or an inlay.BaseConfig')
    chosen = base.names(model) if base is not None else {}
    for name, piece in pieces.items():
        is_packed = isinstance(model.get_submodule(name), QuantizedWeight)
        if piece.needs_quantized_base and not is_packed and name not in chosen:
            raise ValueError(
                f'{name}: keep="exact" is for quantized bases, and this one is dense; pass base="nf4", '
                'or use update="in_place"'
            )
        if piece.needs_dense_base and (is_packed or name in chosen):
            raise ValueError(
                f"{name}: rows of tokens are trained on a dense weight, and this one is quantized; leave it dense with "
                "inlay.BaseConfig(skip_modules=[...])"
            )
        if piece.in_place and (is_packed or name in chosen):
            raise ValueError(
                f'{name}: update="in_place" writes into a dense weight, and this base is quantized; use "additive"'
            )
        if method.needs_base and is_packed:
            raise ValueError(
                f"{name}: {method.needs_base} starts from the dense weight, and this one is quantized already"
            )


def check_sites(model: nn.Module, paths: Iterable[str], loaded: bool = True) -> None:
    """:func:`check_tunable` of the linears among ``paths``, :func:`check_stacks` of modules of experts, and
    :func:`check_output` of the others."""
    checks = {LinearSite: check_tunable, ExpertsSite: check_stacks}
    for path in paths:
        checks.get(type(site_of(model, path)), check_output)(model, path, loaded)


def check_stacks(model: nn.Module, name: str, loaded: bool = True) -> None:
    """Raise ValueError if a piece on the experts ``name`` would do something wrong, or they have no weights yet."""
    module = model.get_submodule(name)
    if loaded and any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False)):
        raise ValueError(f"{name} is on the meta device: load its weights before tune")
    if "inlay_whole" in module.__dict__:
        raise ValueError(f"{name} trains whole in another adapter; a piece on it as well would train it twice")
    proven_layout(module, name)


def check_output(model: nn.Module, name: str, loaded: bool = True) -> None:
    """Raise ValueError if a piece on the module ``name``, no linear, could not be merged, or has no weight yet."""
    weight = getattr(model.get_submodule(name), "weight", None)
    if not isinstance(weight, nn.Parameter):
        kind = type(model.get_submodule(name)).__name__
        raise ValueError(f"{name}: wanted a module with a weight to merge into, got {kind} without one")
    if loaded and weight.device.type == "meta":
        raise ValueError(f"{name} is on the meta device: load its weights before tune")
    if isinstance(module := model.get_submodule(name), nn.Embedding):
        if "inlay_whole" in module.__dict__:
            raise ValueError(f"{name} trains whole in another adapter; a piece on it as well would train it twice")
        lookup_of(module, name)


def check_tunable(model: nn.Module, name: str, loaded: bool = True) -> None:
    """Raise ValueError if a delta on the linear ``name`` would do nothing or something wrong, or has no weight yet
    where the model should be ``loaded``."""
    module = model.get_submodule(name)
    if isinstance(module, TunedLinear | QuantizedWeight):
        if not isinstance(module, QuantizedWeight):
            _check_shared(model, name, module)
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
    if "inlay_whole" in module.__dict__:
        raise ValueError(f"{name} trains whole in another adapter; a piece on it as well would train it twice")
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
            "both on merge; untie them or add it to exclude_modules; rows of a tied head train by its embedding "
            "(inlay.TokenRows, inlay.LoRA(embeddings=True))"
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
