"""Export an adapter to the formats other libraries read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.linear import is_conv1d, is_linear
from ..bases.quantized import QuantizedWeight
from ..nn.tuned_linear import TunedLinear
from ..pieces.embedding import EmbeddingLowRank
from ..pieces.experts import ExpertsLowRank
from ..pieces.linear import LinearPiece
from ..state import pieces_of, require_state, tuned_linears
from ..ties import sharers
from .files import CONFIG_NAME, KEY_PREFIX, WEIGHTS_NAME, peft_keys, read_json, write_files
from .peft_rules import check_accepted, check_in_peft, peft_targets
from .save import check_worth_saving, in_file, peft_modules, tied_option

FORMATS = ("peft-lora", "vllm-lora")

#: The ranks that vLLM's max_lora_rank can be set to (vllm/config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@torch.no_grad()
def export(model: nn.Module, directory: str | Path, *, format: str = "peft-lora", name: str | None = None) -> None:
    """Write an adapter as a PEFT LoRA that PEFT and vLLM load: ``B·A`` equals ``ΔW`` bit for bit.

    Ranks are zero-padded to the largest, and ``lora_alpha = r``, so that PEFT's scaling is 1. What trained whole goes
    along as PEFT's ``modules_to_save``. Where PEFT is installed, it loads what is written, on a model without weights.

    Args:
        format: "peft-lora"; or "vllm-lora", the same files, checked against vLLM's rules first, with the rank padded
            to the next one that vLLM has (1, 8, 16, 32, 64, 128, 256, 320, 512): start it with that max_lora_rank.
        name: which adapter; the active one if None.

    Raises:
        TypeError: the model is not tuned.
        ValueError: unknown format; not one adapter; a delta that no LoRA factors express exactly; values that are
            not finite, or all untrained; what PEFT or vLLM would refuse or silently ignore; or a directory that holds
            an adapter saved by inlay, which would be lost.
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
    pieces = pieces_of(model, name)
    linears = {path: module for path, module in tuned_linears(model).items() if path in pieces}
    tables = {path: piece for path, piece in pieces.items() if isinstance(piece, EmbeddingLowRank)}
    stacks = {path: piece for path, piece in pieces.items() if isinstance(piece, ExpertsLowRank)}
    for path, piece in pieces.items():
        if path not in linears and path not in tables and path not in stacks:
            raise ValueError(f"{path}: a {type(piece).__name__} on a {_kind(model, path)} is no LoRA; merge it instead")
    if not linears and not tables and not stacks:
        raise ValueError(f"adapter {name!r} has no delta on a linear, which is all that a LoRA can hold; merge instead")
    if format == "peft-lora":
        check_accepted(model, list(linears))
    elif tables:
        raise ValueError(f"vllm-lora: vLLM leaves the embedding {next(iter(tables))} as it is; merge instead")
    elif stacks:
        raise ValueError(f"vllm-lora: vLLM wants experts' factors one by one, not {next(iter(stacks))}; merge instead")
    factors = {path: exact_factors(path, module, module.deltas[name]) for path, module in linears.items()}
    others: list[Any] = [*tables.values(), *stacks.values()]
    rank = max([*(a.shape[0] for a, _ in factors.values()), *(piece.rank for piece in others)])
    if format == "vllm-lora":
        rank = vllm_rank(model, linears, rank)
    tensors = {}
    for path, (a, b) in factors.items():
        tensors[f"{KEY_PREFIX}{path}.lora_A.weight"] = _pad(a, 0, rank)
        tensors[f"{KEY_PREFIX}{path}.lora_B.weight"] = _pad(b, 1, rank)
    tied = sharers(model, tables)
    for path, piece in tables.items():
        a, b = piece.lora_embedding_A.detach(), piece.scale * piece.lora_embedding_B.detach()
        tensors[f"{KEY_PREFIX}{path}.lora_embedding_A"] = _pad(a, 0, rank)
        tensors[f"{KEY_PREFIX}{path}.lora_embedding_B"] = _pad(b, 1, rank)
        for head in tied.get(path, ()):  # which PEFT holds once more, by its own names
            if is_linear(model.get_submodule(head)):
                tensors[f"{KEY_PREFIX}{head}.lora_A.weight"] = _pad(b, 1, rank).t().clone()
                tensors[f"{KEY_PREFIX}{head}.lora_B.weight"] = _pad(a, 0, rank).t().clone()
    for path, piece in stacks.items():
        tensors |= {f"{KEY_PREFIX}{path}.{key}": tensor for key, tensor in piece.exported(rank).items()}
    check_worth_saving(model, name, tensors)
    tensors |= whole_in_file(model, name, format)
    transposed = any(
        is_conv1d(holder := m.plain_holder[0]) or getattr(holder, "conv1d", False) for m in linears.values()
    )
    targets = [*linears, *tables]
    config = lora_config(model, rank, targets, transposed, peft_modules(model, state.methods[name]))
    if format == "peft-lora":
        config |= peft_targets(model, pieces) | tied_option(model, name)
        check_in_peft(model, config, tensors)
    write_files(Path(directory), {WEIGHTS_NAME: tensors, CONFIG_NAME: config})
    if format == "vllm-lora":
        print(f"inlay: rank {rank}; serve it with vLLM's --enable-lora --max-lora-rank {rank}")


def _kind(model: nn.Module, path: str) -> str:
    return type(model.get_submodule(path)).__name__


def whole_in_file(model: nn.Module, name: str, format: str) -> dict[str, Tensor]:
    """What adapter ``name`` trains whole and what the user unfroze, by key in the file; ValueError for vLLM."""
    held = in_file(model, name)
    if held and format == "vllm-lora":
        raise ValueError(f"vllm-lora: {next(iter(held))} trained whole, which vLLM does not load; merge instead")
    return {f"{KEY_PREFIX}{key}": tensor for key, tensor in held.items()}


def vllm_rank(model: nn.Module, linears: Mapping[str, nn.Module], rank: int) -> int:
    """The rank vLLM needs for this adapter; ValueError with the reason if vLLM would not serve it.

    Source: vllm/lora/peft_helper.py and vllm/lora/models.py.
    """
    if rank > VLLM_RANKS[-1]:
        raise ValueError(
            f"vllm-lora: wanted a rank of at most {VLLM_RANKS[-1]}, got {rank} (the most channels of one linear); "
            "merge instead, or train fewer channels per linear"
        )
    if not hasattr(model, "prepare_inputs_for_generation") or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"vllm-lora: wanted a decoder-only language model, got {type(model).__name__}; merge instead")
    for path, module in linears.items():
        if is_conv1d(module.plain_holder[0]):
            raise ValueError(f"vllm-lora: {path} is a Conv1D, for whose models vLLM has no LoRA; merge instead")
        if model.get_submodule(path) is model.get_output_embeddings():
            raise ValueError(f"vllm-lora: {path} is the output head, which vLLM leaves as it is; merge instead")
    return next(r for r in VLLM_RANKS if r >= rank)


def exact_factors(path: str, module: TunedLinear, delta: nn.Module) -> tuple[Tensor, Tensor]:
    """``(A, B)`` of a delta on ``module``, or ValueError saying that it has none."""
    factors = delta.lora_factors(partial(_dense_weight, module)) if isinstance(delta, LinearPiece) else None
    if factors is None:
        raise ValueError(f"{path}: a {type(delta).__name__} is no exact LoRA; merge it instead")
    return factors


def _dense_weight(module: TunedLinear) -> Tensor:
    weight = module.dense_base(torch.float32) if isinstance(module, QuantizedWeight) else module.weight_view
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def lora_config(
    model: nn.Module, rank: int, targets: list[str], transposed: bool, modules_to_save: list[str] | None = None
) -> dict:
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
        "modules_to_save": modules_to_save,
        "target_modules": sorted(targets),
        "use_dora": False,
        "use_rslora": False,
    }


def _pad(factor: Tensor, dim: int, rank: int) -> Tensor:
    missing = rank - factor.shape[dim]
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim) if missing else factor
