"""Tensors that an adapter trains whole: a task head, embeddings, a norm.

The module keeps its place, class and state-dict keys. Where an adapter that trains one of its tensors is active, that
adapter's copy stands in the tensor's place, and the module computes with it in the base's dtype; else the base's own
tensor stands there. Tied tensors are one: every module that holds it gets the copy. How a copy is held, and whether it
is one: :class:`inlay.pieces.Whole`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.quantized import QuantizedWeight
from ..pieces import Whole
from ..pieces.lookup import Lookup, lookup_of
from ..sharding import is_sharded, whole
from ..sites import names_above
from .head import DeferringHead
from .holder import Holder
from .mixed import Mixed, mix, unmix
from .table import look_up, sums_apart


@dataclass
class WholeTensor:
    """One tensor of the model and what adapters made of it.

    Attributes:
        original: the base's own. copies: the adapters', by name; where one is in place, the module's is newer.
        active: whose values are in place; None for the base's own.
        fresh: adapters whose copy still is the original's memory, until :func:`begin` makes it theirs.
        overwritten: the adapter that trains the original's own memory, for good; None if it is kept.
    """

    original: Tensor
    copies: dict[str, Tensor] = field(default_factory=dict)
    active: str | None = None
    fresh: set[str] = field(default_factory=set)
    overwritten: str | None = None


class TrainedWhole(Mixed):
    """Mixin of a module that holds tensors trained whole: it computes in the base's dtype."""

    inlay_whole: dict[str, WholeTensor]  # by the name of the tensor in this module
    inlay_kind: str  # "linear", "head" or "embedding" where torch's own forward, or the deferring one, is behind this
    inlay_lookup: Lookup | None  # what an embedding does with its table's rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.inlay_lookup is not None and sums_apart(self, self._parameters["weight"]):
            (ids,) = (*args, *kwargs.values())
            return self._scaled(look_up(self._parameters["weight"], ids, self.padding_idx))
        cast = {
            name: held.original.dtype
            for name, held in self.inlay_whole.items()
            if name in self._parameters and self._parameters[name].dtype != held.original.dtype
        }
        if not cast:
            return super().forward(*args, **kwargs)
        if self.inlay_kind == "embedding":  # the rows looked up, not the whole table
            rows = nn.Embedding.forward(self, *args, **kwargs)
            return self._scaled(rows.to(cast["weight"]))
        # As the twin would compute it, in a form that torch.compile can follow.
        if self.inlay_kind == "linear" or (self.inlay_kind == "head" and torch.compiler.is_compiling()):
            weight, bias = (_cast(self, cast, name) for name in ("weight", "bias"))
            x = args[0] if args else kwargs["input"]
            # T5 casts what enters to the dtype of the weight that it finds here, from the base's and back exactly
            return nn.functional.linear(x.to(weight.dtype) if x.dtype == self.weight.dtype else x, weight, bias)
        twin = copy.copy(self)
        twin.__dict__["_parameters"] = {name: _cast(self, cast, name) for name in self._parameters}
        return super(TrainedWhole, twin).forward(*args, **kwargs)

    def _scaled(self, rows: Tensor) -> Tensor:
        scale = 1.0 if self.inlay_lookup is None else self.inlay_lookup.scale(rows)
        return rows if scale == 1.0 else rows * scale

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Moves between devices take the copies along; no dtype move rounds what is being trained."""
        before = {name: _get(self, name).detach() for name in self.inlay_whole}
        super()._apply(fn, recurse)
        for name, held in self.inlay_whole.items():
            live = _get(self, name)
            if held.active is not None:
                if live.dtype != before[name].dtype and held.active not in held.fresh:
                    live.data = before[name].to(live.device)
                moved = fn(held.original.data)
                shared = held.overwritten is not None or held.active in held.fresh
                held.original = _moved(held.original, live.data if shared and live.dtype == moved.dtype else moved)
            for adapter, other in held.copies.items():
                if adapter != held.active and other is not live:
                    device = fn(torch.empty(0, device=other.device, dtype=other.dtype)).device
                    held.copies[adapter] = _moved(other, other.data.to(device))
        return self


def _moved(tensor: Tensor, value: Tensor) -> Tensor:
    """``tensor`` with ``value``; the same object where torch allows it, as an optimizer may hold it."""
    if not torch._has_compatible_shallow_copy_type(tensor, value):
        return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    tensor.data = value
    return tensor


def _cast(module: nn.Module, dtypes: Mapping[str, torch.dtype], name: str) -> Any:
    held = module._parameters[name]
    return held.to(dtypes[name]) if held is not None and name in dtypes else held


def _get(module: nn.Module, name: str) -> Tensor:
    held = module._parameters.get(name)
    return held if held is not None else module._buffers[name]


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    (module._parameters if name in module._parameters else module._buffers)[name] = tensor


def owners(model: nn.Module) -> Iterator[tuple[str, TrainedWhole, str, WholeTensor]]:
    """``(state-dict key, module, name in it, tensor)`` of everything trained whole; tied tensors once per module."""
    for path, module in model.named_modules():
        if isinstance(module, TrainedWhole):
            for name, held in module.inlay_whole.items():
                yield f"{path}.{name}" if path else name, module, name, held


def whole_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What ``adapter`` trains whole, by state-dict key, as it is now; a tied tensor under every key it has. Not what a
    schedule may choose and has not yet, which is the base's.
    """
    return {
        key: _get(module, name) if held.active == adapter else held.copies[adapter]
        for key, module, name, held in owners(model)
        if adapter in held.copies and adapter not in held.fresh
    }


def unfrozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters, by key, that belong to no adapter: those the user unfroze himself."""
    ours = {id(_get(module, name)) for _, module, name, _ in owners(model)}
    return {
        key: parameter
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and ".deltas." not in key and id(parameter) not in ours
    }


def hidden_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Originals and copies that are not in place, and so are no parameter or buffer of ``model`` just now."""
    for _, module, name, held in owners(model):
        yield from (t for t in (held.original, *held.copies.values()) if t is not _get(module, name))


def keys_of(model: nn.Module, names: Iterable[str]) -> list[str]:
    """State-dict keys of all tensors of the modules (or of the tensors themselves) ``names``.

    Raises:
        ValueError: a weight among them is quantized, or carries an adapter's piece. Biases may train beside one.
    """
    wanted = set(names)
    keys = []
    for path, module in model.named_modules(remove_duplicate=False):
        if ".deltas." in f".{path}.":
            continue
        for name in (*module._parameters, *module._buffers):
            key = f"{path}.{name}" if path else name
            if _maybe(module, name) is None or name in module._non_persistent_buffers_set:
                continue
            if not wanted.isdisjoint(names_above(key)):
                _check_trainable(path, module, name)
                keys.append(key)
    return keys


def _check_trainable(path: str, module: nn.Module, name: str) -> None:
    if name == "bias":
        return
    if isinstance(module, Holder) and module.deltas:
        raise ValueError(
            f"{path}.{name} is to be trained whole (modules_to_save), and an adapter has a piece on {path}; choose one"
        )
    if isinstance(module, QuantizedWeight):
        raise ValueError(
            f"{path} is to be trained whole and is stored quantized; load the model with it dense (skip_modules), "
            "or pass modules_to_save=[] to train no head"
        )


def check_whole(model: nn.Module, adapter: str, specs: Mapping[str, Whole]) -> None:
    """ValueError if a value in ``specs`` does not fit its tensor, or ``adapter`` has it already."""
    for key, spec in specs.items():
        module, name = _owner(model, key)
        held, value = _get(module, name), spec.value
        if isinstance(module, TrainedWhole) and adapter in getattr(module.inlay_whole.get(name), "copies", ()):
            raise ValueError(f"adapter {adapter!r} trains {key} already; choose another adapter_name")
        if value is None:
            continue
        if value.shape != held.shape:
            raise ValueError(
                f"{key}: wanted shape {tuple(held.shape)}, got {tuple(value.shape)}; load the adapter on a "
                "model with as many labels (num_labels) or tokens as it was trained with"
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{key} holds NaN or infinity; the file is corrupt: save the adapter again")


def _owner(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    path, _, name = key.rpartition(".")
    module = dict(model.named_modules()).get(path, nn.Identity())
    if module._parameters.get(name) is None and module._buffers.get(name) is None:
        raise ValueError(f"the adapter holds {key!r}, which this {type(model).__name__} lacks; load its own base")
    return module, name


def add_whole(model: nn.Module, adapter: str, specs: Mapping[str, Whole]) -> None:
    """Give ``adapter`` a copy of each tensor by state-dict key, as :class:`inlay.pieces.Whole` says."""
    for key, spec in specs.items():
        module, name = _owner(model, key)
        held = _held(model, module, name)
        if adapter in held.copies:  # tied to one before
            continue
        _check_kept(key, held)
        held.copies[adapter] = _copy(held, adapter, spec)


def _copy(held: WholeTensor, adapter: str, spec: Whole) -> Tensor:
    """What trains, in place of the original: a Parameter for a Parameter."""
    original = held.original
    shares = not spec.keep_original or (spec.lazy and spec.value is None and spec.held == "base")
    if shares and isinstance(original, nn.Parameter):
        _share(held, adapter, spec)
        return nn.Parameter(original.detach(), requires_grad=False)
    source = original if spec.value is None else spec.value
    made = source.detach().to(original.device, copy=True)
    if not isinstance(original, nn.Parameter):
        return made
    if made.is_floating_point():
        wider = torch.promote_types(original.dtype, torch.float32)
        made = made.to(original.dtype if spec.held == "base" else wider)
    return nn.Parameter(made, requires_grad=False)


@torch.no_grad()
def _share(held: WholeTensor, adapter: str, spec: Whole) -> None:
    """Note that an adapter's copy is the original's own memory."""
    if spec.value is not None:
        held.original.data.copy_(spec.value)
    if spec.lazy and spec.value is None:
        held.fresh.add(adapter)
    if not spec.keep_original:
        held.overwritten = adapter


def begin(held: WholeTensor, adapter: str, live: Any) -> None:
    """Before a copy that a schedule chose trains: it gets memory of its own, unless the base is not kept, or FSDP2 has
    given the parts of ``live``, what stands in the module, memory of their own."""
    if adapter not in held.fresh:
        return
    held.fresh.discard(adapter)
    if held.overwritten != adapter and not is_sharded(live):
        copy_ = held.copies[adapter]
        copy_.data = copy_.data.clone()  # the Parameter stays the one that optimizers know


def _held(model: nn.Module, module: nn.Module, name: str) -> WholeTensor:
    """The record of a tensor, made in every module that holds it."""
    if isinstance(module, TrainedWhole) and name in module.inlay_whole:
        return module.inlay_whole[name]
    tensor = _get(module, name)
    if isinstance(tensor, nn.Parameter):
        tensor.requires_grad_(False)
    held = WholeTensor(tensor)
    for other in list(model.modules()):
        for own in (*other._parameters, *other._buffers):
            if _maybe(other, own) is tensor:
                _mark(other)
                other.inlay_whole[own] = held
    return held


def _maybe(module: nn.Module, name: str) -> Tensor | None:
    held = module._parameters.get(name)
    return held if held is not None else module._buffers.get(name)


def begin_all(model: nn.Module) -> None:
    """:func:`begin` of everything in place: for who writes into weights that a schedule has not chosen yet."""
    for _, module, name, held in owners(model):
        if held.active is not None:
            begin(held, held.active, _get(module, name))


def _check_kept(key: str, held: WholeTensor) -> None:
    if held.overwritten is not None:
        raise ValueError(
            f"{key}: the base's own values are gone: adapter {held.overwritten!r} trains them in place "
            "(keep_original=False); tune with keep_original=True to disable, switch or add adapters"
        )


def _mark(module: nn.Module) -> None:
    if isinstance(module, TrainedWhole):
        return
    known = {nn.Linear.forward: "linear", nn.Embedding.forward: "embedding", DeferringHead.forward: "head"}
    lookup = _lookup(module)
    kind = known.get(type(module).forward, "" if lookup is None else "embedding")
    held: Any = mix(module, TrainedWhole)
    held.inlay_kind, held.inlay_whole, held.inlay_lookup = kind, {}, lookup


def _lookup(module: nn.Module) -> Lookup | None:
    """What an embedding does with its rows; None if ``module`` is none, or does something that is not known."""
    if not isinstance(module, nn.Embedding):
        return None
    if type(module).forward is not nn.Embedding.forward and module.weight.is_meta:
        return None  # it cannot be tried
    try:
        return lookup_of(module, "whole")
    except ValueError:
        return None


def switch_whole(model: nn.Module, active: Sequence[str]) -> None:
    """Put the copies of the ``active`` adapters in place, and the base's own tensors where none of them has one.

    Raises:
        ValueError: two active adapters train one tensor whole; or its parameter is sharded. Nothing has changed then.
    """
    wanted: dict[int, str | None] = {}
    for key, module, name, held in owners(model):
        chosen = [adapter for adapter in active if adapter in held.copies]
        if len(chosen) > 1:
            raise ValueError(f"{key} is trained whole by each of the adapters {chosen}; activate one of them at a time")
        wanted[id(held)] = chosen[0] if chosen else None
        if wanted[id(held)] != held.active and held.active is not None:
            _check_kept(key, held)
        if wanted[id(held)] != held.active and is_sharded(_get(module, name)):
            raise ValueError(f"{key} is sharded (FSDP2): adapters that train it whole cannot be switched any more")
    _place(model, wanted)


def _place(model: nn.Module, wanted: Mapping[int, str | None]) -> None:
    entries = list(owners(model))
    for _, module, name, held in entries:  # keep what is in place: it may have been assigned anew
        if wanted[id(held)] != held.active:
            if held.active is None:
                held.original = _get(module, name)
            else:
                held.copies[held.active] = _get(module, name)
    for _, _, _, held in entries:
        held.active = wanted[id(held)]
    for _, module, name, held in entries:
        if held.active is None or not is_sharded(_get(module, name)):
            _put(module, name, held.original if held.active is None else held.copies[held.active])


def train_whole(model: nn.Module, adapters: Sequence[str]) -> None:
    """Make the copies of these adapters trainable, and no other."""
    for _, module, name, held in owners(model):
        for adapter, made in held.copies.items():
            live = _get(module, name) if adapter == held.active else made
            if isinstance(live, nn.Parameter) and live.is_floating_point():
                live.requires_grad_(adapter in adapters)


def active_whole(model: nn.Module) -> dict[int, str | None]:
    """Which adapter's copy is in place, to :func:`restore_whole` it."""
    return {id(held): held.active for _, _, _, held in owners(model)}


def restore_whole(model: nn.Module, before: Mapping[int, str | None]) -> None:
    """Put in place what was when :func:`active_whole` was asked."""
    _place(model, {id(held): before.get(id(held), held.active) for _, _, _, held in owners(model)})


def remove_whole(model: nn.Module, adapter: str) -> None:
    """Forget the copies of an adapter that is not active."""
    for _, module, name, held in list(owners(model)):
        if held.active == adapter:
            _put(module, name, held.original)
        if adapter in held.copies and set(held.copies) == {adapter}:
            del module.inlay_whole[name]
    for _, _, _, held in list(owners(model)):
        held.copies.pop(adapter, None)
    for module in list(model.modules()):
        if isinstance(module, TrainedWhole) and not module.inlay_whole:
            _strip(module)


@torch.no_grad()
def settle_whole(model: nn.Module) -> None:
    """Make what is in place ordinary frozen tensors of the base's dtype: the merge of what was trained whole."""
    made: dict[int, Tensor] = {}
    for _, module, name, held in list(owners(model)):
        if id(held) not in made:
            value = whole(_get(module, name)).detach().to(held.original.dtype)
            made[id(held)] = nn.Parameter(value, requires_grad=False) if name in module._parameters else value
        _put(module, name, made[id(held)])
    for module in list(model.modules()):
        if isinstance(module, TrainedWhole):
            _strip(module)


def _strip(module: nn.Module) -> None:
    while isinstance(module, TrainedWhole):  # it may stand behind a mixin that was put on later
        unmix(module)
