"""The code of a function with other functions in place of some that it calls by name.

A model's forward is left as it is where only what it calls has a faster equal: a copy of its code runs with globals of
its own, and its decorators are kept. Nothing that others see is changed.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any


def innermost(function: Any) -> FunctionType | None:
    """The function that decorators made by ``functools.wraps`` stand in front of; None if there is none of Python's."""
    while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function if isinstance(function, FunctionType) else None


def called_global(function: Any, name: str) -> Callable | None:
    """What ``function``'s code finds under the global ``name``, or None if it asks for no such name."""
    inner = innermost(function)
    if inner is None or name not in inner.__code__.co_names:
        return None
    found = inner.__globals__.get(name)
    return found if callable(found) else None


def exchanged(function: FunctionType, others: Mapping[str, Callable]) -> FunctionType | None:
    """``function`` with ``others`` under the names of globals it uses; None if a decorator hides what it decorates.

    Other globals are those of now; they are read through no module, so that torch.compile finds the same ones.
    """
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        names = {key: value for key, value in function.__globals__.items() if key != "__name__"}
        return _with(function, {"__builtins__": builtins, **names, **others}, function.__closure__)
    cells = function.__closure__ or ()
    inner = exchanged(wrapped, others) if any(_held(cell) is wrapped for cell in cells) else None
    if inner is None:
        return None
    made = _with(function, function.__globals__, tuple(CellType(inner) if _held(c) is wrapped else c for c in cells))
    made.__dict__["__wrapped__"] = inner
    return made


def _with(function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    for attribute in ("__kwdefaults__", "__annotations__", "__doc__", "__module__", "__qualname__"):
        setattr(made, attribute, getattr(function, attribute))
    made.__dict__.update(function.__dict__)
    return made


def _held(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # not filled yet
