"""Whole heads as the structure to select: how many channels a head has, on either side of an attention linear."""

from __future__ import annotations

import re

from torch import nn

from ..targets import role_of

#: Where attention modules keep the width of one head.
_HEAD_ATTRIBUTES = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv")
_QKV = re.compile(r"(?:.*\.)?(?:[qkv]_proj|query|key|value|SelfAttention\.[qkv]|EncDecAttention\.[qkv])")


def head_dim_of(model: nn.Module, name: str, channels: int) -> int | None:
    """Channels per head of the attention linear ``name``, or None if it is no attention linear.

    An o_proj has query heads on its input side; k_proj and v_proj have key/value heads on their output side: all of
    the same width, so that grouped-query attention needs no special case.

    Raises:
        ValueError: the width found does not divide ``channels``.
    """
    if role_of(name) != "o_proj" and not _QKV.fullmatch(name):
        return None
    width = _from_ancestors(model, name) or _from_config(model)
    if width is None:
        return None
    if channels % width:
        raise ValueError(f"{name}: {channels} channels are not whole heads of {width}; pass granularity=1")
    return width


def _from_ancestors(model: nn.Module, name: str) -> int | None:
    """The nearest enclosing modules, or a child of theirs (BERT keeps it in ``attention.self``), know the width."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, max(len(parts) - 4, 0), -1):
        ancestor = model.get_submodule(".".join(parts[:depth]))
        for module in (ancestor, *ancestor.children()):
            for attribute in _HEAD_ATTRIBUTES:
                if isinstance(width := getattr(module, attribute, None), int):
                    return width
    return None


def _from_config(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    for attribute in _HEAD_ATTRIBUTES:
        if isinstance(width := getattr(config, attribute, None), int):
            return width
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None
