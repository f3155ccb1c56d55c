"""Imports run one way: no module of inlay imports, at its top or within a function, one that imports it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import inlay

ROOT = Path(inlay.__file__).parent


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of inlay that ``name`` imports, wherever in its code; not for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")
            start = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (start, node.module or "") if part)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                if full in known:
                    yield full
                elif source in known:
                    yield source
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while (last := stack.pop()) != node:
                component.append(last)
            if component:
                found.append(sorted([*component, node]))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def graph() -> dict[str, set[str]]:
    known = modules()
    made = {name: set(imported(name, path, known)) - {name} for name, path in known.items()}
    made["inlay"] = set()  # the front page imports everything, and is imported by nothing but for its version
    return made


def test_no_circle():
    assert circles(graph()) == []


def test_it_would_notice():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert "inlay.adapters.load" in graph()["inlay.tune"] and "inlay.tune" in graph()["inlay.train.finetune"]


def test_order_of_the_house():
    """What stands above is imported by nothing below it."""
    order = ["sites", "methods.base", "state", "install", "adapters.load", "model", "tune"]
    reached = graph()

    def below(name: str) -> set[str]:
        seen, todo = set(), [name]
        while todo:
            for other in reached[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    for place, name in enumerate(order):
        for later in order[place + 1 :]:
            assert f"inlay.{later}" not in below(f"inlay.{name}"), (name, later)
