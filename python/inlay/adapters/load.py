"""Load adapters onto a base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import BaseConfig
from ..fingerprint import fingerprint
from ..install import DEFAULT_ADAPTER, adopt_bitsandbytes, check_base_fits, check_sites, install
from ..methods import METHODS, Method, stored_keys
from ..nn.tuned_linear import TunedLinear
from ..nn.whole import check_whole, train_whole, whole_tensors
from ..schedules import SCHEDULES, active_schedules
from ..state import pieces_of, require_state, sample_of, sample_weights, state_of, tuned_modules
from .base_tables import put_tables, take_tables
from .changed_rows import put_on, take_changed
from .files import CONFIG_NAME, FORMAT_VERSION, KEY_PREFIX, SCHEDULE, WEIGHTS_NAME, read_json, read_tensors
from .tied_files import check_tied, without_tied
from .whole_files import (
    check_complete,
    check_fingerprint,
    check_head,
    check_swap_whole,
    check_ties,
    fit_vocabulary,
    specs_of,
    take_whole,
    with_paths,
)

#: Mean |difference| over rms of sampled base weights above which the base is another model. Four-bit quantization
#: moves weights by about 0.09 of their rms; two unrelated models differ by more than 1.
_OTHER_BASE = 0.3


def load_onto(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str = DEFAULT_ADAPTER,
    base: str | BaseConfig | None = None,
    check_base: bool = True,
    trainable: bool = True,
    fused_blocks: bool = True,
    fused_loss: bool = True,
) -> nn.Module:
    """What :func:`inlay.load` does, but for the methods that a tuned model gains; arguments and errors are its own."""
    directory = Path(directory)
    config = read_json(directory / CONFIG_NAME)
    method = method_of(config, directory)
    tensors = read_tensors(directory / WEIGHTS_NAME)
    points = take_schedule(tensors)
    tables = take_tables(tensors) if "inlay" not in config else {}
    changed = take_changed(tensors, config, directory)
    whole = take_whole(tensors, config, method)
    grouped = group_by_module(tensors, directory)
    if not grouped and not whole and not changed:
        raise ValueError(f"{directory}: the adapter holds no tensor")
    adopt_bitsandbytes(model)
    put_tables(model, tables)
    grouped = without_tied(model, grouped, config, directory)
    modules = dict(model.named_modules())
    for path in grouped:
        if path not in modules:
            raise ValueError(f"the adapter tunes {path!r}, which this {type(model).__name__} lacks; load its own base")
    check_sites(model, grouped)
    check_tied(model, grouped, config, method)
    state = state_of(model)
    if state is not None and name in state.methods:
        raise ValueError(f"this model has an adapter {name!r} already; pass another name")
    ours = config.get("inlay") or {}
    fit_vocabulary(model, config, whole, {path: method.rows_held(held) for path, held in grouped.items()})
    whole |= put_on(model, changed)
    modules = dict(model.named_modules())
    method = with_paths(model, config, method, whole)
    specs = specs_of(model, method, whole, ours.get("unfrozen") or ())
    check_whole(model, name, specs)
    check_complete(model, method, whole, config, directory)
    check_modules(grouped, config, directory)
    check_ties(model, config, whole)
    if check_base:
        _check_base(model, ours.get("base_sample") or {})
        check_head(model, ours, whole)
        check_fingerprint(model, ours.get("fingerprint") or {}, list(grouped), list(whole))
    pieces = {path: method.restore(modules[path], tensors, path) for path, tensors in grouped.items()}
    base = None if base is None else BaseConfig.of(base)
    _check_same_quantization(method, base, ours.get("base"))
    check_base_fits(model, method, pieces, base)
    sample, marks = sample_weights(model, list(pieces)), fingerprint(model, list(pieces), whole)
    if base is not None:
        method.quantize(model, base.leaving(whole), pieces)
        for path, tensors in grouped.items():  # which quantizing may have initialized again
            pieces[path].load(tensors, path)
    install(
        model,
        method,
        pieces,
        name,
        sample=sample,
        marks=marks,
        base=base,
        whole=specs,
        schedule=method.schedule(model),
        fused_blocks=fused_blocks,
        fused_loss=fused_loss,
    )
    put_schedule(model, name, points, directory)
    if not trainable:
        train_whole(model, ())
        for piece in pieces.values():
            piece.requires_grad_(False)
        for schedule in active_schedules(model).values():
            schedule.frozen = True
    return model


@torch.no_grad()
def hotswap(model: nn.Module, directory: str | Path, name: str = DEFAULT_ADAPTER) -> nn.Module:
    """Put the values and channels of the adapter in ``directory`` into adapter ``name``, in the same memory.

    Nothing is built anew: compiled models need no recompiling, optimizers and CUDA graphs keep their tensors.

    Raises:
        TypeError: the model is not tuned.
        ValueError: no such adapter, or the files hold another method, other linears or other shapes; nothing changed.
    """
    directory = Path(directory)
    state = require_state(model, "hotswap")
    if name not in state.methods:
        raise ValueError(f"no adapter {name!r}; there are {sorted(state.methods)}")
    config = read_json(directory / CONFIG_NAME)
    method, old = method_of(config, directory), state.methods[name]
    tensors = read_tensors(directory / WEIGHTS_NAME)
    points = take_schedule(tensors)
    changed = take_changed(tensors, config, directory)
    whole = take_whole(tensors, config, method) | put_on(model, changed)
    grouped = group_by_module(tensors, directory)
    mine = pieces_of(model, name)
    held = {path: module for path, module in tuned_modules(model).items() if path in mine}
    if type(method) is not type(old) or grouped.keys() != held.keys():
        got = f"{type(method).__name__} on {len(grouped)} modules"
        raise ValueError(
            f"{directory}: wanted {type(old).__name__} on the same {len(held)} modules to swap in, got {got}"
        )
    check_swap_whole(model, name, whole, directory)
    _check_base(model, (config.get("inlay") or {}).get("base_sample") or {})
    plain = {path: m.plain_holder[0] if isinstance(m, TunedLinear) else m for path, m in held.items()}
    for module in held.values():
        module.restore_base()
    pieces = {path: method.restore(plain[path], tensors, path) for path, tensors in grouped.items()}
    for path, piece in pieces.items():
        held[path].pieces()[name].check_swap(piece, path)
    for path, piece in pieces.items():
        held[path].swap_delta(name, piece)
    for key, tensor in whole_tensors(model, name).items():
        tensor.data.copy_(whole[key])
    put_schedule(model, name, points, directory)
    state.methods[name] = method
    return model


def take_schedule(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove from an adapter file's ``tensors`` the state of its schedule, and return it."""
    prefix = f"{KEY_PREFIX}{SCHEDULE}."
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def put_schedule(model: nn.Module, name: str, points: dict[str, Tensor], where: Path) -> None:
    """Give the schedule of adapter ``name`` the state that was saved; ValueError if it does not fit."""
    held: Any = model._modules.get(SCHEDULES)
    schedule = held[name] if held is not None and name in held else None
    wanted = {} if schedule is None else schedule.state_dict()
    if {k: v.shape for k, v in wanted.items()} != {k: v.shape for k, v in points.items()}:
        raise ValueError(
            f"{where}: wanted the state {sorted(wanted)} of a schedule, got {sorted(points)}; the file is incomplete"
        )
    for key, value in points.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{where}: {SCHEDULE}.{key} holds NaN or infinity; the file is corrupt: save it again")
    if schedule is not None:
        schedule.load_state_dict(points)


def _check_same_quantization(method: Method, base: BaseConfig | None, recorded: dict[str, Any] | None) -> None:
    """A base that was chosen together with the adapter is part of it."""
    if not method.needs_base or recorded is None:
        return
    if base is None or base.to_dict() != recorded:
        got = "none" if base is None else base
        raise ValueError(
            f"this adapter was made with {method.needs_base}, which chose the quantized base with it: wanted the dense "
            f"model and base=inlay.BaseConfig(**{recorded}), got {got}"
        )


def method_of(config: dict[str, Any], where: Path) -> Method:
    """The method config in an ``adapter_config.json``."""
    kind, ours = config.get("peft_type"), config.get("inlay")
    if kind not in METHODS:
        raise ValueError(f"{where}: wanted an adapter of {sorted(METHODS)}, got peft_type={kind!r}")
    if ours is None and "inlay" not in config:
        return METHODS[kind].from_peft(config, where)
    if not isinstance(ours, dict) or "options" not in ours:
        raise ValueError(f"{where}: wanted an adapter saved by inlay, got one without its 'inlay' section")
    if not isinstance(ours.get("format"), int) or not isinstance(ours["options"], dict):
        raise ValueError(f"{where}: the 'inlay' section of {CONFIG_NAME} is broken; save the adapter again")
    if ours["format"] > FORMAT_VERSION:
        raise ValueError(
            f"{where}: format {ours['format']} is newer than this inlay reads ({FORMAT_VERSION}); upgrade inlay"
        )
    try:
        return METHODS[kind].from_dict(ours["options"])
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def group_by_module(tensors: dict[str, Tensor], where: Path) -> dict[str, dict[str, Tensor]]:
    """Adapter-file tensors as ``{module: {tensor name: tensor}}``."""
    grouped: dict[str, dict[str, Tensor]] = {}
    known = stored_keys()
    for key, tensor in tensors.items():
        leaf = next((leaf for leaf in known if key.endswith(f".{leaf}")), None)
        if not key.startswith(KEY_PREFIX) or leaf is None:
            raise ValueError(f"{where}: wanted keys like {KEY_PREFIX}<module>.<one of {known}>, got {key!r}")
        grouped.setdefault(key[len(KEY_PREFIX) : -len(leaf) - 1], {})[leaf] = tensor
    return grouped


def check_modules(grouped: Mapping[str, Any], config: Mapping[str, Any], where: Path) -> None:
    """ValueError if the file lacks all tensors of a module that the adapter tunes."""
    missing = sorted(set((config.get("inlay") or {}).get("modules") or ()) - set(grouped))
    if missing:
        raise ValueError(f"{where}: wanted tensors of {missing[0]}, which the adapter tunes; the file is incomplete")


def _check_base(model: nn.Module, sample: dict[str, list[float]]) -> None:
    state = state_of(model)
    names = [n for n in sample if any(n == m for m, _ in model.named_modules())]
    here = state.base_sample if state is not None and all(n in state.base_sample for n in names) else None
    here = here if here is not None else sample_weights(model, names, every=True)
    for name in names:
        _compare(name, sample[name], here.get(name, []))


def check_sample(name: str, sampled: list[float] | None, weight: Tensor) -> None:
    """ValueError if ``sampled`` values of the base an adapter was trained on are not those of ``weight``, as stored."""
    if sampled is not None:
        _compare(name, sampled, sample_of(weight))


def _compare(name: str, sampled: list[float], here: list[float]) -> None:
    wanted, got = torch.tensor(sampled), torch.tensor(here)
    if wanted.shape != got.shape:
        return
    distance = (wanted - got).abs().mean() / wanted.square().mean().sqrt().clamp_min(1e-12)
    if not distance <= _OTHER_BASE:
        raise ValueError(
            f"this is not the base the adapter was trained on: {name}.weight differs by {float(distance):.2f} of "
            "its size; load the right base, or pass check_base=False if you mean it"
        )
