"""Whole heads as the structure to select: how many channels a head has, on either side of an attention linear."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

#: Where attention modules, and configs, keep the width of one head.
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
#: The same under multi-head latent attention, whose queries and keys are wider than its values.
_VALUE_WIDTHS, _QUERY_WIDTHS = ("v_head_dim",), ("qk_head_dim",)
_QUERY_OR_KEY = re.compile(r"(?:.*\.)?(?:[qk]_proj|q_b_proj|query|key|SelfAttention\.[qk]|EncDecAttention\.[qk])")
_VALUE = re.compile(r"(?:.*\.)?(?:v_proj|value|SelfAttention\.v|EncDecAttention\.v)")
_ATTENTION = re.compile(r"attn|attention", re.I)


def head_dim_of(model: nn.Module, name: str, role: str | None, channels: int) -> int | None:
    """Channels per head of the attention linear ``name``, or None if it is no attention linear.

    An o_proj has query heads on its input side; k_proj and v_proj have key/value heads on their output side: all of
    the same width, so that grouped-query attention needs no special case. Under multi-head latent attention the heads
    of o_proj and v_proj are ``v_head_dim`` wide, those of queries and keys ``qk_head_dim``.

    Args:
        role: what :func:`inlay.roles.roles` says of the linear.

    Raises:
        ValueError: the width found does not divide ``channels``.
    """
    if role == "o_proj" or _VALUE.fullmatch(name):
        keys = (*_VALUE_WIDTHS, *_HEAD_WIDTHS)
    elif _QUERY_OR_KEY.fullmatch(name):
        keys = (*_QUERY_WIDTHS, *_HEAD_WIDTHS)
    else:
        return None
    width = _head_width(model, name, keys)
    if width is not None and channels % width:
        raise ValueError(f"{name}: {channels} channels are not whole heads of {width}; pass granularity=1")
    return width


def _head_width(model: nn.Module, name: str, keys: tuple[str, ...]) -> int | None:
    """What the nearest enclosing modules, or a child of theirs (BERT keeps it in ``attention.self``), say; else, for
    linears of attention, what a config says."""
    holders = list(_holders(model, name))
    for holder in holders:
        if (width := _first(holder, keys)) is not None:
            return width
    if not _ATTENTION.search(name.rpartition(".")[0]):
        return None
    configs = [config for holder in (*holders, model) if (config := getattr(holder, "config", None)) is not None]
    return next((width for config in configs if (width := _from_config(config, keys)) is not None), None)


def _holders(model: nn.Module, name: str) -> Iterator[nn.Module]:
    parts = name.split(".")
    for depth in range(len(parts) - 1, max(len(parts) - 4, 0), -1):
        path = ".".join(parts[:depth])
        yield (ancestor := model.get_submodule(path))
        if _ATTENTION.search(path):  # a block's other children are no concern of this one
            yield from ancestor.children()


def _first(holder: Any, keys: tuple[str, ...]) -> int | None:
    return next((width for key in keys if isinstance(width := getattr(holder, key, None), int) and width > 0), None)


def _from_config(config: Any, keys: tuple[str, ...]) -> int | None:
    if (width := _first(config, keys)) is not None:
        return width
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def is_attention(model: nn.Module, name: str) -> bool:
    """Whether the linear ``name`` is in an attention module, by the names and classes of what it is in."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        if _ATTENTION.search(parts[depth - 1]) or _ATTENTION.search(type(model.get_submodule(path)).__name__):
            return not isinstance(model.get_submodule(path), nn.ModuleList)
    return False
