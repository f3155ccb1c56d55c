"""Which modules an adapter trains whole: the head of a model made for a task, and what ``modules_to_save`` names.

The head of a classifier, a reward model or a question answerer starts from random numbers: frozen, or left out of the
adapter, it would be another one after loading.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

from torch import nn

from .targets import is_linear, suffix_match

_T = TypeVar("_T")

#: transformers' auto mappings of models whose head is made for a task (and not by pretraining, as a language model's).
_TASKS = re.compile(
    "CLASSIFICATION|QUESTION_ANSWERING|MULTIPLE_CHOICE|XVECTOR|CTC|SEGMENTATION|OBJECT_DETECTION|REGRESSION"
)
_NOT_TASKS = re.compile("ZERO_SHOT|MASK_GENERATION")


def task_head(model: nn.Module) -> list[str]:
    """Names of the modules and tensors that make up a task model's head; empty for a language model or a bare one.

    A task model is one of transformers' auto classes for a task, or any other with a linear of ``num_labels`` outputs
    outside its base model, that generates nothing and has no output embedding. Its head is all that is outside the
    base model; where the base holds the head too, the linears with ``num_labels`` outputs.
    """
    config = getattr(model, "config", None)
    labels = getattr(config, "num_labels", None)
    if not isinstance(labels, int) or not hasattr(model, "base_model_prefix") or _generates(model):
        return []
    outside = _outside(model)
    if is_task_class(type(model)):
        return outside or _linears_of_labels(model, labels)
    linears = {name: m for name, m in model.named_modules() if is_linear(m) and _within(name, outside)}
    return outside if any(_outputs(m) == labels for m in linears.values()) else []


def is_task_class(kind: type) -> bool:
    """Whether a model class, or one it derives from, is among transformers' auto classes for a task."""
    return any(base.__name__ in _task_classes() for base in kind.__mro__)


@cache
def _task_classes() -> frozenset[str]:
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for name, mapping in vars(modeling_auto).items():
        if name.endswith("_MAPPING_NAMES") and _TASKS.search(name) and not _NOT_TASKS.search(name):
            for value in mapping.values():
                found.update((value,) if isinstance(value, str) else value)
    return frozenset(found)


def _generates(model: Any) -> bool:
    """Whether it is a language model: by its output embedding, or, for a class of no task, because it can generate."""
    task = is_task_class(type(model))
    can = getattr(model, "can_generate", None)
    generates = bool(callable(can) and can())
    return (generates if task else True) and model.get_output_embeddings() is not None or (generates and not task)


def _bases(model: Any) -> list[nn.Module]:
    """The base model inside, by its name or as a backbone; else all children that are models, and their embeddings."""
    for name in (getattr(model, "base_model_prefix", ""), "backbone"):
        if isinstance(model._modules.get(name), nn.Module):
            return [model._modules[name]]
    models = [child for child in model.children() if hasattr(child, "base_model_prefix")]
    shared = [child for child in model.children() if isinstance(child, nn.Embedding)]
    return models + shared if models else []


def _outside(model: nn.Module) -> list[str]:
    """Top-level modules and tensors with weights outside the base model; none where there is no base model inside."""
    bases = _bases(model)
    if not bases:
        return []
    inside = {id(parameter) for base in bases for parameter in base.parameters()}
    found: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:
            found.setdefault(name.split(".")[0])
    return [name for name in found if not any(model._modules.get(name) is base for base in bases)]


def _linears_of_labels(model: nn.Module, labels: int) -> list[str]:
    found = [name for name, module in model.named_modules() if is_linear(module) and _outputs(module) == labels]
    if found and labels not in (getattr(model.config, width, None) for width in ("hidden_size", "d_model")):
        return found
    warnings.warn(
        f"no head found in this {type(model).__name__} to train and save with the adapter; if it has one, name it: "
        "modules_to_save=[...]",
        stacklevel=4,
    )
    return []


def _outputs(module: Any) -> int | None:
    return getattr(module, "out_features", getattr(module, "nf", None))


def whole_names(model: nn.Module, method: Any) -> list[str]:
    """The modules (and single tensors) that ``method`` trains whole: the task head and what it names, by full path.

    Raises:
        ValueError: an entry of ``modules_to_save`` names nothing, or is a target too.
    """
    named = method.modules_to_save
    if named is not None and not named:
        return []
    targets = method.target_modules if isinstance(method.target_modules, list | tuple | set) else ()
    head = [name for name in task_head(model) if not any(suffix_match(name, target) for target in targets)]
    found: dict[str, None] = dict.fromkeys(head)
    for entry in (named,) if isinstance(named, str) else named or ():
        found.update(dict.fromkeys(_matches(model, entry)))
    for name in found:
        if name not in head and any(suffix_match(name, target) for target in targets):
            raise ValueError(f"{name} is in target_modules and in modules_to_save; a delta or all of it: choose one")
    return [name for name in found if not any(_within(name, [outer]) for outer in found if outer != name)]


def _matches(model: nn.Module, entry: str) -> list[str]:
    names = [n for n, m in model.named_modules() if n and ".deltas" not in n and any(True for _ in m.parameters())]
    names += [name for name, _ in model.named_parameters() if ".deltas." not in name]
    matched = [name for name in names if suffix_match(name, entry)]
    if not matched:
        leaves = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
        close = difflib.get_close_matches(entry, leaves, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"modules_to_save: {entry!r} names nothing in this {type(model).__name__}; {hint}names end in {leaves}"
        )
    return matched


def _within(name: str, outer: Iterable[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in outer)


def without_whole(builders: Mapping[str, _T], whole: list[str]) -> dict[str, _T]:
    """``builders`` of the linears that are not trained whole anyway.

    Raises:
        ValueError: none is left.
    """
    kept = {name: build for name, build in builders.items() if not _within(name, whole)}
    if builders and not kept:
        raise ValueError(f"every target is part of what trains whole ({whole}); name other target_modules")
    return kept
