"""How many tokens and positions a model has tables for; see also :mod:`inlay.train.fits`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def text_config(model: Any) -> Any:
    """The config of the part of ``model`` that writes text: of a multimodal wrapper the nested one; None without."""
    config = getattr(model, "config", None)
    nested = getattr(config, "get_text_config", None)
    return nested(decoder=True) if nested is not None else config


def embedding_rows(model: Any) -> int | None:
    """Token ids that the input embeddings have rows for; None where they cannot be told."""
    return _rows(_held(model, "get_input_embeddings")) or getattr(text_config(model), "vocab_size", None)


def head_rows(model: Any) -> int | None:
    """Token ids that the output head has logits for, which may be fewer or more than the embeddings' rows."""
    return _rows(_held(model, "get_output_embeddings")) or embedding_rows(model)


def made_for(model: Any) -> int | None:
    """Positions that the config declares."""
    config = text_config(model)
    found = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def plain_tokens(model: Any, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random ids of ``shape``, none of which a config names: those stand for padding, images and the like."""
    configs: list[Any] = [getattr(model, "config", None), text_config(model)]
    named = {
        value
        for config in configs
        for key, value in (config.to_dict() if hasattr(config, "to_dict") else {}).items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    free = torch.tensor([token for token in range(min(embedding_rows(model) or 64, 4096)) if token not in named])
    return free[torch.randint(len(free), shape, generator=generator)]


def _held(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _rows(table: Any) -> int | None:
    if isinstance(table, nn.Embedding):
        return table.num_embeddings
    if isinstance(out := getattr(table, "out_features", None), int):  # packed weights have other shapes
        return out
    weight = getattr(table, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None
