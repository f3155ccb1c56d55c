"""Export an adapter to the formats other libraries read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..bases.linear import is_conv1d
from ..model import require_state, tuned_linears
from .files import CONFIG_NAME, KEY_PREFIX, WEIGHTS_NAME, peft_keys, read_json, write_files
from .save import check_worth_saving

FORMATS = ("peft-lora",)


@torch.no_grad()
def export(model: nn.Module, directory: str | Path, *, format: str = "peft-lora", name: str | None = None) -> None:
    """Write an adapter as a PEFT LoRA that PEFT and vLLM load: ``B·A`` equals ``ΔW`` bit for bit.

    Ranks are zero-padded to the largest, and ``lora_alpha = r``, so that PEFT's scaling is 1.

    Args:
        name: which adapter; the active one if None.

    Raises:
        TypeError: the model is not tuned.
        ValueError: unknown format; not one adapter; a delta that no LoRA factors express exactly; values that are
            not finite, or all untrained; or a directory that holds an adapter saved by inlay, which would be lost.
    """
    if format not in FORMATS:
        raise ValueError(f"format: wanted one of {FORMATS}, got {format!r}")
    state = require_state(model, "export")
    if name is None and len(state.active) != 1:
        raise ValueError(f"wanted one active adapter to export, got {list(state.active)}; pass name=...")
    name = name if name is not None else state.active[0]
    if name not in state.methods:
        raise ValueError(f"no adapter {name!r}; there are {sorted(state.methods)}")
    config_file = Path(directory) / CONFIG_NAME
    if config_file.exists() and "inlay" in read_json(config_file):
        raise ValueError(f"{directory} holds an adapter saved by inlay; export to another directory")
    linears = {path: module for path, module in tuned_linears(model).items() if name in module.deltas}
    factors = {path: exact_factors(path, module.deltas[name]) for path, module in linears.items()}
    rank = max(a.shape[0] for a, _ in factors.values())
    tensors = {}
    for path, (a, b) in factors.items():
        tensors[f"{KEY_PREFIX}{path}.lora_A.weight"] = _pad(a, 0, rank)
        tensors[f"{KEY_PREFIX}{path}.lora_B.weight"] = _pad(b, 1, rank)
    check_worth_saving(model, name, tensors)
    transposed = any(
        is_conv1d(holder := m.plain_holder[0]) or getattr(holder, "conv1d", False) for m in linears.values()
    )
    config = lora_config(model, rank, list(linears), transposed)
    write_files(Path(directory), {WEIGHTS_NAME: tensors, CONFIG_NAME: config})


def exact_factors(path: str, delta: nn.Module) -> tuple[Tensor, Tensor]:
    """``(A, B)`` of a delta, or ValueError saying that it has none."""
    factors = delta.lora_factors()
    if factors is None:
        raise ValueError(f"{path}: a {type(delta).__name__} is no exact LoRA; merge it instead")
    return factors


def lora_config(model: nn.Module, rank: int, targets: list[str], transposed: bool) -> dict:
    """A LoRA ``adapter_config.json``. Targets are whole module names, so that nothing else matches."""
    return {
        **peft_keys(model),
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(targets),
        "use_dora": False,
        "use_rslora": False,
    }


def _pad(factor: Tensor, dim: int, rank: int) -> Tensor:
    missing = rank - factor.shape[dim]
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim) if missing else factor
