"""Reads the golden files: what bitsandbytes made of some weights."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def cases(file: str) -> dict[str, dict[str, Tensor]]:
    """``{case: {key: tensor}}`` of a golden file whose keys are ``case/key``."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(GOLDEN / file).items():
        case, _, name = key.partition("/")
        found.setdefault(case, {})[name] = tensor
    return found


def stored(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a case, what a state dict would hold."""
    return {key: tensor for key, tensor in case.items() if key not in ("w", "dense")}
