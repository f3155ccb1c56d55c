"""The tensors of an adapter file that were trained whole, and the base they fit on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..fingerprint import allowed, distances, fingerprint, stored_as, warn_if_off
from ..methods import Method, stored_keys
from ..nn.whole import keys_of, whole_tensors
from ..pieces import Whole
from ..sites import names_above
from ..state import state_of
from ..targets import suffix_match
from ..task_head import task_head
from .files import KEY_PREFIX
from .save import vocabulary_of


def named_modules_of(config: Mapping[str, Any], method: Method) -> list[str]:
    """What the adapter says it trains whole: names of ours by full path, or PEFT's by the end of the name."""
    return list(dict.fromkeys([*(method.modules_to_save or ()), *(config.get("modules_to_save") or ())]))


def take_whole(tensors: dict[str, Tensor], config: Mapping[str, Any], method: Method) -> dict[str, Tensor]:
    """Remove from an adapter file's ``tensors`` those trained whole; by state-dict key of the model."""
    names = named_modules_of(config, method)
    ours = config.get("inlay")
    loose = {*(ours.get("unfrozen") or ()), *(ours.get("whole") or ())} if ours is not None else set()
    found, known = {}, stored_keys()
    for stored in list(tensors):
        key = stored.removeprefix(KEY_PREFIX)
        delta = any(key.endswith(f".{leaf}") for leaf in known)
        if stored.startswith(KEY_PREFIX) and not delta and (ours is None or key in loose or _is_named(key, names)):
            found[key] = tensors.pop(stored)
    return found


def _is_named(key: str, names: Sequence[str]) -> bool:
    return any(suffix_match(path, name) for path in names_above(key) for name in names)


def with_paths(model: nn.Module, config: Mapping[str, Any], method: Method, whole: Mapping[str, Tensor]) -> Method:
    """``method`` with the full paths of what the file trains whole: PEFT names the ends of them, there or not."""
    names = named_modules_of(config, method)
    paths = [path for path, _ in model.named_modules() if path] + [key for key in whole]
    held = [p for p in paths if any(suffix_match(p, n) for n in names) and any(_under(key, p) for key in whole)]
    outer = [p for p in dict.fromkeys(held) if not any(_under(p, other) for other in held if other != p)]
    return replace(method, modules_to_save=outer) if outer else method


def specs_of(
    model: nn.Module, method: Method, whole: Mapping[str, Tensor], unfrozen: Sequence[str]
) -> dict[str, Whole]:
    """How each tensor of the file is held, and those that the method's schedule may come to choose."""
    named = method.modules_to_save or ()
    specs = dict(method.plan(model, None).whole) if method.chooses_over_time else {}
    for key, value in whole.items():
        beside = any(_under(key, path) for path in named)
        spec = Whole(held="base") if key in unfrozen else Whole() if beside else method.holding
        specs[key] = spec.of(value)
    return specs


def _under(key: str, path: str) -> bool:
    return key == path or key.startswith(f"{path}.")


def check_complete(
    model: nn.Module, method: Method, whole: Mapping[str, Tensor], config: Mapping[str, Any], where: Path
) -> None:
    """ValueError if the file lacks a tensor of what ``method`` trains whole; a tied one is there under one name."""
    for key in (config.get("inlay") or {}).get("whole") or ():
        if key not in whole:
            raise ValueError(f"{where}: wanted {KEY_PREFIX}{key}, which the adapter trains; the file is incomplete")
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    names = [name for name in method.modules_to_save or () if _is_there(model, name, tensors)]
    there = {id(tensors[key]) for key in whole if key in tensors}
    for key in keys_of(model, names):
        if id(tensors[key]) not in there:
            raise ValueError(
                f"{where}: wanted {KEY_PREFIX}{key}, which the adapter trains whole; the file is incomplete"
            )


def _is_there(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> bool:
    return name in tensors or any(name == path for path, _ in model.named_modules())


def check_ties(model: nn.Module, config: Mapping[str, Any], whole: Mapping[str, Tensor]) -> None:
    """ValueError if a file made by PEFT, which trains a copy of a tied tensor, is to go on a model where it is tied."""
    if config.get("inlay") is not None or config.get("ensure_weight_tying"):
        return
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for key, value in whole.items():
        for other, parameter in tensors.items():
            if other == key or parameter is not tensors.get(key):
                continue
            if other not in whole or not value.equal(whole[other]):
                raise ValueError(
                    f"the adapter holds {key} alone, which PEFT untied from {other}, and in this model they are tied; "
                    "load the model with tie_word_embeddings=False"
                )


def check_head(model: nn.Module, ours: Mapping[str, Any], whole: Mapping[str, Tensor]) -> None:
    """Refuse, or warn about (where the file is too old to tell), a task's head that the adapter knows nothing of.

    Raises:
        ValueError: the head of ``model`` is not in the file, nor was it there in training.
    """
    head = tuple(task_head(model))
    missing = [name for name in head if not any(key == name or key.startswith(f"{name}.") for key in whole)]
    if not missing:
        return
    if not ours.get("fingerprint"):
        warnings.warn(
            f"the adapter holds no {missing[0]}, the head of this {type(model).__name__}, which stays as it is: if it "
            "was not loaded from a checkpoint that was trained with it, outputs mean nothing",
            stacklevel=3,
        )
    elif not any(key.startswith(f"{missing[0]}.") for key in ours["fingerprint"].get("marks", {})):
        raise ValueError(
            f"the adapter holds no {missing[0]}, the head of this {type(model).__name__}, nor was there one in "
            "training; load it on the class it was trained on, or pass check_base=False to train the head anew"
        )


def check_swap_whole(model: nn.Module, name: str, whole: Mapping[str, Tensor], where: Path) -> None:
    """ValueError unless ``whole`` fits what adapter ``name`` trains whole."""
    mine = {key: tuple(tensor.shape) for key, tensor in whole_tensors(model, name).items()}
    theirs = {key: tuple(tensor.shape) for key, tensor in whole.items()}
    if mine != theirs:
        raise ValueError(f"{where}: wanted the same tensors trained whole, {mine}, to swap in, got {theirs}")


def fit_vocabulary(
    model: Any, config: Mapping[str, Any], whole: Mapping[str, Tensor], rows: Mapping[str, Tensor | None]
) -> None:
    """Give ``model`` as many tokens as the adapter was trained with, if the adapter holds what the new ones are.

    Args:
        rows: of modules by path, the rows of their weights that the adapter holds.

    Raises:
        ValueError: it does not, or ``model`` is tuned already.
    """
    wanted, here = (config.get("inlay") or {}).get("vocabulary"), vocabulary_of(model)
    if wanted is None or here is None or wanted == here:
        return
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    keys = {key for key, p in model.named_parameters(remove_duplicate=False) if any(p is t.weight for t in tables if t)}
    new = set(range(here, wanted))
    full = {f"{path}.weight" for path, held in rows.items() if held is not None and new.issubset(held.tolist())}
    known = {id(model.get_parameter(key)) for key in keys & ({*whole} | (full if new else set()))}
    same = {id(model.get_parameter(key)) for key in keys} - known
    if same or state_of(model) is not None:
        raise ValueError(
            f"the adapter was trained with {wanted} tokens and this {type(model).__name__} has {here}: call "
            f"resize_token_embeddings({wanted}) first, and give the new tokens the embeddings they had in training "
            "(the adapter holds them if they were trainable, named in modules_to_save, or rows of inlay.TokenRows, of "
            "the head too where it is not tied)"
        )
    model.resize_token_embeddings(wanted, mean_resizing=False)


def check_fingerprint(
    model: nn.Module, recorded: Mapping[str, Any], tuned: Sequence[str], whole: Sequence[str]
) -> None:
    """Warn if the base is off, with the measured difference.

    Raises:
        ValueError: it has another head than the adapter was trained under.
    """
    state = state_of(model)
    here = state.fingerprint if state is not None and state.fingerprint else fingerprint(model, tuned, whole)
    off = distances(recorded, here)
    stored = recorded.get("stored", "dense"), here.get("stored") or stored_as(model, tuned)
    head = tuple(f"{name}." for name in task_head(model))
    for key, value in off.items():
        if key.startswith(head) and key not in whole and not value <= allowed(*stored):
            raise ValueError(
                f"{key} differs by {value:.0%} of its size from that in training, and the adapter does not hold it: "
                "its head was frozen (modules_to_save=[]); load the base with that head, or pass check_base=False"
            )
    warn_if_off(off, tuned, *stored)
