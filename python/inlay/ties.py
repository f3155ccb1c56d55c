"""Modules that share one weight: tied heads, the embeddings of an encoder and its decoder.

A piece on one of them acts on all of them (:mod:`inlay.pieces.tied`): trained, saved and merged once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .pieces import Piece
from .pieces.tied import Tied
from .sharding import is_sharded

#: Where a Parameter is: the path of its module and its name there.
Place = tuple[str, str]


def places_by_tensor(model: nn.Module) -> dict[Any, list[Place]]:
    """Where each Parameter of ``model`` stands, one that several modules hold under one key; not those of pieces."""
    found: dict[Any, list[Place]] = {}
    for path, module in model.named_modules():
        if ".deltas." in f".{path}.":
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(_key(parameter), []).append((path, name))
    return found


def _key(tensor: Tensor) -> Any:
    """Equal for tensors that are the same, or the same memory."""
    pointer = 0 if tensor.device.type == "meta" or is_sharded(tensor) else tensor.data_ptr()
    return (tensor.device, pointer, tuple(tensor.shape), tensor.stride()) if pointer else id(tensor)


def sharers(model: nn.Module, paths: Iterable[str]) -> dict[str, list[str]]:
    """The other modules that share the weight of each module of ``paths``, for those that share one."""
    by_tensor = places_by_tensor(model)
    found = {}
    for path in paths:
        weight = model.get_submodule(path)._parameters.get("weight")
        places = by_tensor.get(_key(weight), []) if weight is not None else []
        others = [other for other, _ in places if other != path]
        if others:
            found[path] = others
    return found


def each_once(model: nn.Module, names: Iterable[str]) -> list[str]:
    """``names`` without the embeddings that look up the table of an earlier one: a piece acts on all of these."""
    kept: list[str] = []
    shared = sharers(model, [name for name in names if isinstance(model.get_submodule(name), nn.Embedding)])
    for name in names:
        if not any(earlier in shared.get(name, ()) and earlier in shared for earlier in kept):
            kept.append(name)
    return kept


def tied_pieces(model: nn.Module, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """What ``pieces``, by module, put on the other modules that share the weights of theirs.

    Raises:
        ValueError: a piece cannot act there; or two of them would change one weight.
    """
    made: dict[str, Piece] = {}
    for path, others in sharers(model, pieces).items():
        for other in others:
            if other in pieces:
                raise ValueError(
                    f"{path} and {other} share one weight in this {type(model).__name__}, and there is a piece for "
                    f"each: a piece on {path} acts on both; leave {other} out, or load the model with "
                    "tie_word_embeddings=False"
                )
            made[other] = pieces[path].tied(model.get_submodule(other), other)
    return made


def check_not_whole(model: nn.Module, paths: Iterable[str], whole: Iterable[str]) -> None:
    """ValueError if a tensor of ``whole``, by key, is the weight of a module of ``paths`` under another name."""
    held = {key.rpartition(".")[0] for key in whole if key.endswith(".weight")}
    for path, others in sharers(model, paths).items():
        for other in held.intersection(others):
            raise ValueError(
                f"{other}.weight would train whole, a piece sits on {path}, and the two are one weight (tied): choose "
                "one of them (target_modules, modules_to_save)"
            )


def ties_of(model: nn.Module, paths: Iterable[str]) -> list[list[Place]]:
    """The places of each weight of the modules ``paths`` that has several, those of ``paths`` first."""
    wanted = set(paths)
    groups = [places for places in places_by_tensor(model).values() if len(places) > 1]
    kept = [sorted(places, key=lambda place: place[0] not in wanted) for places in groups]
    return [places for places in kept if places[0][0] in wanted]


def tie_again(model: nn.Module, ties: Iterable[Iterable[Place]]) -> None:
    """Put the Parameter at the first of each group of places at the others."""
    for places in ties:
        (path, name), *others = places
        kept = model.get_submodule(path)._parameters[name]
        for other, other_name in others:
            model.get_submodule(other)._parameters[other_name] = kept


def is_tied(piece: Any) -> bool:
    """Whether a piece owns no tensor, but is the effect of one on another module."""
    return isinstance(piece, Tied)
