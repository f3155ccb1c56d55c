"""Which linears a method tunes: names, regular expressions, "all-linear", and each family's own names.

Conventions are PEFT's: a list entry matches a module whose name equals it or ends with ``"." + entry``; a string is a
regular expression matched against the whole name; ``"all-linear"`` is every linear but the output head.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from .bases.linear import computes_linear, is_linear
from .roles import ROLES, roles
from .sites import holds_experts

#: Roles whose input channels are the structures S²FT selects; every other linear is tuned by output channels.
INPUT_SIDE_ROLES = ROLES

_LAYER_INDEX = re.compile(r"\.(\d+)\.")


def layer_index(name: str) -> int | None:
    """The first number in a dotted module name: the index of its block."""
    found = _LAYER_INDEX.search(f".{name}.")
    return int(found.group(1)) if found else None


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of ``model`` by name, in module order; a module reachable by two names appears under the first."""
    return {name: module for name, module in model.named_modules() if name and is_linear(module)}


def output_head_names(model: nn.Module) -> set[str]:
    """Names of the output embedding, which "all-linear" leaves out (as PEFT does)."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return {name for name, module in model.named_modules() if head is not None and module is head}


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """Every ``nn.Embedding`` of ``model`` by name: of tokens, positions and the like."""
    return {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Embedding)}


def input_embedding(model: nn.Module) -> str | None:
    """Name of the table that ``model`` looks its tokens up in; None where it has none."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        table = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # no text model
        return None
    return next((name for name, module in embeddings(model).items() if module is table), None)


def stacks_of(module: nn.Module, path: str, entries: Sequence[str]) -> list[str]:
    """The stacks of matrices of the experts ``module``, named ``path``, that ``entries`` (target_parameters) mean."""
    return [name for name in _stacks(module) if any(suffix_match(f"{path}.{name}", entry) for entry in entries)]


def resolve_stacks(
    model: nn.Module, entries: Sequence[str], layers: int | Sequence[int] | None = None
) -> dict[str, list[str]]:
    """The modules of experts of which ``entries`` mean a stack, and which.

    Raises:
        ValueError: an entry means none. One for the weight of a linear belongs into ``target_modules``.
    """
    experts = {name: module for name, module in model.named_modules() if holds_experts(module)}
    for entry in entries:
        if not any(stacks_of(module, path, [entry]) for path, module in experts.items()):
            known = sorted({f"{path.rpartition('.')[2]}.{n}" for path, m in experts.items() for n in _stacks(m)})
            raise ValueError(
                f"target_parameters: {entry!r} matched no stack of experts' matrices; there are "
                f"{known or 'none in this model'}; linears are named in target_modules"
            )
    found = {path: names for path, module in experts.items() if (names := stacks_of(module, path, entries))}
    kept = {path: names for path, names in found.items() if _in_layers(path, layers)}
    if found and not kept:
        there = sorted(index for path in found if (index := layer_index(path)) is not None)
        raise ValueError(f"layers_to_transform={layers}: no experts there; there are some in {there or 'no layer'}")
    return kept


def _stacks(module: nn.Module) -> list[str]:
    return [name for name, p in module._parameters.items() if p is not None and p.dim() == 3]


def resolve(
    model: nn.Module,
    target_modules: str | Sequence[str] | None,
    *,
    defaults: Sequence[str] = INPUT_SIDE_ROLES,
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    also: Collection[str] = (),
    by_name: Collection[str] = (),
) -> list[str]:
    """Names of the linears that ``target_modules`` means, in module order.

    ``also``: names of other modules that may be meant as well, and belong to "all-linear"; ``by_name``: of such that do
    not, but are meant where a pattern or a list matches them (embeddings).

    Raises:
        ValueError: an explicit target matches no linear; or no default does; or an exclusion or a layer means none; or
            they leave none.
    """
    candidates = linears(model)
    if also or by_name:
        others = {*also, *by_name}
        candidates = {name: m for name, m in model.named_modules() if name in candidates or name in others}
    if target_modules is None:
        names = [name for name, role in roles(model).items() if role in defaults]
        wanted = f"the defaults {tuple(defaults)}"
        if not names:
            raise ValueError(
                f"{wanted} matched no linear of this {type(model).__name__}: none is an attention output or FFN down "
                f"projection by its place in a block; pass target_modules; {_what_exists(candidates)}"
            )
    elif target_modules == "all-linear":
        heads = output_head_names(model)
        names = [
            name
            for name, m in candidates.items()
            if name in also or (name not in heads and name not in by_name and computes_linear(m))
        ]
        wanted = '"all-linear"'
    elif isinstance(target_modules, str):
        names = [name for name in candidates if matches_pattern(target_modules, name)]
        wanted = f"the pattern {target_modules!r}"
        if not names and (hits := [name for name in candidates if suffix_match(name, target_modules)]):
            raise ValueError(
                f"{wanted} is a regular expression for whole names and matched none, such as {hits[0]!r}; "
                f"did you mean the list [{target_modules!r}]?"
            )
    else:
        names = _match_list(model, candidates, target_modules)
        wanted = f"target_modules={list(target_modules)}"
    if not names:
        raise ValueError(f"{wanted} matched no linear of this {type(model).__name__}; {_what_exists(candidates)}")
    _check_each_matters(candidates, names, exclude_modules, layers_to_transform)
    kept = [n for n in names if not _excluded(n, exclude_modules) and _in_layers(n, layers_to_transform)]
    if not kept:
        raise ValueError(
            f"{wanted} matched {len(names)} linears, but exclude_modules={exclude_modules} and "
            f"layers_to_transform={layers_to_transform} left none; loosen one of them"
        )
    return kept


def _check_each_matters(
    candidates: Iterable[str],
    names: Iterable[str],
    exclude: str | Sequence[str] | None,
    layers: int | Sequence[int] | None,
) -> None:
    """Raise ValueError on an exclusion that matches no linear, or a layer in which nothing is tuned: a typing error."""
    for entry in [] if exclude is None else [exclude] if isinstance(exclude, str) else exclude:
        if not any(_excluded(name, exclude if isinstance(exclude, str) else [entry]) for name in candidates):
            raise ValueError(f"exclude_modules: {entry!r} matched no linear; {_what_exists(candidates, entry)}")
    there = {layer_index(name) for name in names}
    for layer in [] if layers is None else [layers] if isinstance(layers, int) else layers:
        if layer not in there:
            known = sorted(index for index in there if index is not None)
            raise ValueError(f"layers_to_transform: nothing to tune in layer {layer}; there are {known or 'no layers'}")


def matches_pattern(pattern: str, name: str) -> bool:
    """PEFT's rule for a string: a regular expression for the whole name; ValueError if it is none."""
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error}); a list takes plain names") from None


def suffix_match(name: str, entry: str) -> bool:
    """PEFT's rule for a list entry: the whole name, or its end after a dot."""
    return name == entry or name.endswith("." + entry)


def _match_list(model: nn.Module, candidates: Iterable[str], entries: Sequence[str]) -> list[str]:
    """Names matched by any entry. Entries named as a role also match the family's own name for that role."""
    names = list(candidates)
    matched: dict[str, None] = {}
    for entry in entries:
        hits = [n for n in names if suffix_match(n, entry)]
        if not hits and entry in ROLES:
            hits = [n for n, role in roles(model).items() if role == entry]
        if not hits:
            raise ValueError(f"target {entry!r} matched no linear; {_what_exists(names, entry)}")
        matched.update(dict.fromkeys(hits))
    return [n for n in names if n in matched]


def _what_exists(names: Iterable[str], near: str | None = None) -> str:
    """A sentence listing the distinct last parts of the names there are, with a did-you-mean."""
    leaves = sorted({".".join(n.split(".")[-1:]) for n in names})
    hint = difflib.get_close_matches(near, leaves, n=1) if near else []
    mean = f"did you mean {hint[0]!r}? " if hint else ""
    return f"{mean}linears here end in {leaves or 'nothing: there is no nn.Linear or Conv1D'}"


def _excluded(name: str, exclude: str | Sequence[str] | None) -> bool:
    if exclude is None:
        return False
    if isinstance(exclude, str):
        return matches_pattern(exclude, name)
    return any(suffix_match(name, entry) for entry in exclude)


def _in_layers(name: str, layers: int | Sequence[int] | None) -> bool:
    if layers is None:
        return True
    return layer_index(name) in ([layers] if isinstance(layers, int) else layers)
