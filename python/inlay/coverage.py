"""Which weights a tuned model trains, and which it does not: one row per kind of weight."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .bases.quantized import QuantizedWeight
from .nn.whole import owners
from .state import tuned_modules
from .targets import is_linear


@dataclass
class Row:
    """All weights of one name and shape.

    Attributes:
        name: last part of the module's name, or of the parameter's for weights that are no linear's.
        shape: of one of them, as stored in a dense checkpoint. count: how many. tuned: how many carry a delta or
            train whole.
        base: dtype or quantized storage. linear: False for fused expert weights.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    tuned: int
    base: str
    linear: bool


def coverage(model: nn.Module) -> list[Row]:
    """A row for each kind of linear, and of fused expert weight (3-D Parameters that are no linear's), in order."""
    tuned = {*tuned_modules(model), *(key.rpartition(".")[0] for key, _, _, held in owners(model) if held.active)}
    rows: dict[tuple, Row] = {}

    def count(name: str, shape: tuple[int, ...], is_tuned: bool, base: str, linear: bool) -> None:
        row = rows.setdefault((name, shape, base), Row(name, shape, 0, 0, base, linear))
        row.count += 1
        row.tuned += is_tuned

    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        if isinstance(module, QuantizedWeight):
            shape = (module.out_features, module.in_features)
            count(leaf, shape, path in tuned, type(module.storage).__name__, True)
        elif is_linear(module):
            weight = module.weight
            count(leaf, tuple(weight.shape), path in tuned, str(weight.dtype).removeprefix("torch."), True)
    tuned_stacks = stacks_tuned(model)
    for path, parameter in expert_weights(model).items():
        dtype = str(parameter.dtype).removeprefix("torch.")
        count(path.rpartition(".")[2], tuple(parameter.shape), path in tuned_stacks, dtype, False)
    return list(rows.values())


def stacks_tuned(model: nn.Module) -> set[str]:
    """Names of the expert weights that a piece is on, or that train whole."""
    held = {
        f"{path}.{name}"
        for path, module in tuned_modules(model).items()
        for piece in module.pieces().values()
        for name in getattr(piece, "names", ())
    }
    return held | {key for key, _, _, whole in owners(model) if whole.active}


def expert_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Fused expert weights ``[experts, ., .]`` by name: transformers keeps the experts of a mixture so."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if ("expert" in path.lower() or "expert" in type(module).__name__.lower()) and ".deltas" not in path
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def coverage_table(model: nn.Module) -> str:
    """:func:`coverage` as text."""
    lines = [f"{'weight':22} {'shape':22} {'base':10} tuned"]
    for row in coverage(model):
        note = "" if row.linear else "  (fused experts, not quantized)"
        lines.append(f"{row.name:22} {list(row.shape)!s:22} {row.base:10} {row.tuned}/{row.count}{note}")
    return "\n".join(lines)


def tuned_line(model: nn.Module) -> str:
    """What is tuned, in one line: ``o_proj 30/30, down_proj 30/30``, of each kind how many of how many."""
    counts: dict[str, list[int]] = {}
    for row in coverage(model):
        held = counts.setdefault(row.name, [0, 0])
        held[0], held[1] = held[0] + row.tuned, held[1] + row.count
    return ", ".join(f"{name} {tuned}/{count}" for name, (tuned, count) in counts.items() if tuned)


def warn_about_experts(model: nn.Module, tuned: Iterable[str]) -> None:
    """Say once, at ``tune``, that a mixture's experts are left alone; ``tuned``: modules and tensors that are not.

    Where a base is quantized, none is: experts stay dense there."""
    held = set(tuned)
    experts = {name: p for name, p in expert_weights(model).items() if not held & {name, name.rpartition(".")[0]}}
    if experts:
        name, first = next(iter(experts.items()))
        share = sum(p.numel() for p in experts.values()) / max(sum(p.numel() for p in model.parameters()), 1)
        warnings.warn(
            f"{len(experts)} fused expert weights, {share:.0%} of this {type(model).__name__} (first {name} "
            f"{list(first.shape)}), are not quantized, and not tuned unless LoRA's or S2FT's "
            "target_parameters names them; model.print_tuned_modules() shows what is",
            stacklevel=3,
        )
