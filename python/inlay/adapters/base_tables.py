"""Tables of the base that PEFT writes into an adapter file beside a LoRA on embeddings, and puts back at loading.

Source: ``save_embedding_layers`` of peft/utils/save_and_load.py of PEFT 0.21.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..state import state_of
from .files import KEY_PREFIX

_SUFFIX = ".base_layer.weight"


def take_tables(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove from an adapter file's ``tensors`` the base's own weights, and return them by module."""
    keys = [key for key in tensors if key.startswith(KEY_PREFIX) and key.endswith(_SUFFIX)]
    return {key[len(KEY_PREFIX) : -len(_SUFFIX)]: tensors.pop(key) for key in keys}


@torch.no_grad()
def put_tables(model: Any, tables: dict[str, Tensor]) -> None:
    """Give the base the tables that the adapter was trained on, resized if they have more tokens.

    Raises:
        ValueError: ``model`` lacks one; or it is tuned already, and its own differ.
    """
    modules = dict(model.named_modules())
    for path, table in tables.items():
        weight = getattr(modules.get(path), "weight", None)
        if weight is None or weight.dim() != 2 or weight.shape[1] != table.shape[1]:
            raise ValueError(f"the adapter holds the base's {path}.weight, which this {type(model).__name__} lacks")
        if weight.shape == table.shape and weight.equal(table.to(weight)):
            continue
        if state_of(model) is not None:
            raise ValueError(
                f"the adapter was trained on another {path}.weight, {tuple(table.shape)}, than this model has, "
                f"{tuple(weight.shape)}, which carries an adapter already: load it on a model of its own"
            )
        if weight.shape != table.shape:
            model.resize_token_embeddings(table.shape[0], mean_resizing=False)
            modules = dict(model.named_modules())
        modules[path].weight.copy_(table)
