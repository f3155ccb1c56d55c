"""Which linears make the keys and values of attention, and which of their output channels, where one makes queries too.

Separate projections are known by the names they have in all families. What a linear of all three makes where is a
matter of its family's code; the layouts here are proven by tests/methods/test_projections.py: attention does not notice
queries twice as large with keys half as large, and its output is as much larger as the values are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..roles import widths
from ..targets import linears

#: ``key`` and ``value`` name other things too, outside attention.
_IN_ATTENTION = r"(?:.*\.)?\w*(?:[aA]ttention|attn)\w*\.(?:.*\.)?"
_QUERY = re.compile(rf"(?:.*\.)?(?:q_proj|query_proj|q_lin|q_b_proj)|{_IN_ATTENTION}(?:q|query)")
_KEY = re.compile(rf"(?:.*\.)?(?:k_proj|key_proj|k_lin|kv_b_proj)|{_IN_ATTENTION}(?:k|key)")
_VALUE = re.compile(rf"(?:.*\.)?(?:v_proj|value_proj|v_lin)|{_IN_ATTENTION}(?:v|value)")
_FUSED = re.compile(r"(?:.*\.)?(?:c_attn|query_key_value|[qQ]kv_proj|Wqkv|qkv)")


@dataclass(frozen=True)
class Parts:
    """Output channels of a projection, int64: those that make ``keys``, and ``values``."""

    keys: Tensor
    values: Tensor

    @property
    def both(self) -> Tensor:
        """All of them, sorted."""
        return torch.cat([self.keys, self.values]).sort().values


def keys_and_values(model: nn.Module) -> dict[str, Tensor | None]:
    """The linears that make keys or values, in module order: those channels of a fused one, None for a whole one.

    Fused ones of a layout that is not known are left out.
    """
    found: dict[str, Tensor | None] = {}
    for name in linears(model):
        if _KEY.fullmatch(name) or _VALUE.fullmatch(name):
            found[name] = None
        elif (parts := fused_parts(model, name)) is not None:
            found[name] = parts.both
    return found


def is_query_or_value(name: str) -> bool:
    """True if a linear of this name makes queries or values, or all of attention's inputs at once."""
    return any(pattern.fullmatch(name) for pattern in (_QUERY, _VALUE, _FUSED))


def is_fused(name: str) -> bool:
    """True if a linear of this name makes queries, keys and values at once."""
    return _FUSED.fullmatch(name) is not None


def fused_parts(model: nn.Module, name: str) -> Parts | None:
    """Where keys and values stand in the output of the linear ``name``, or None if it is not fused or not known."""
    module, config = model.get_submodule(name), getattr(model, "config", None)
    layout = LAYOUTS.get(getattr(config, "model_type", ""))
    if layout is None or not is_fused(name):
        return None
    out = widths(module)[1]
    heads, groups, grouped = layout(config)
    width, rest = divmod(out, heads + 2 * groups)
    if rest:
        raise ValueError(f"{name}: {out} channels are not those of {heads} query heads and 2·{groups} others")
    channels = torch.arange(out).reshape(groups, -1, width) if grouped else torch.arange(out).reshape(1, -1, width)
    count = 1 if grouped else groups
    return Parts(channels[:, -2 * count : -count].reshape(-1), channels[:, -count:].reshape(-1))


def _heads(config: Any) -> int:
    keys = ("num_attention_heads", "n_head", "n_heads")
    return next(count for key in keys if isinstance(count := getattr(config, key, None), int))


def _stacked(config: Any) -> tuple[int, int, bool]:
    """All queries, then all keys, then all values."""
    inner = getattr(config, "attn_config", None)
    groups = getattr(config, "num_key_value_heads", None) or getattr(inner, "kv_n_heads", None) or _heads(config)
    return _heads(config), groups, False


def _by_head(config: Any) -> tuple[int, int, bool]:
    """Query, key and value of the first head, of the second, and so on."""
    return _heads(config), _heads(config), True


def _bigcode(config: Any) -> tuple[int, int, bool]:
    """All queries and one key and value; or by head."""
    return (_heads(config), 1, False) if config.multi_query else _by_head(config)


def _falcon(config: Any) -> tuple[int, int, bool]:
    """Several queries, a key and a value for each group; or all queries and one key and value; or by head."""
    if config.new_decoder_architecture:
        return _heads(config), config.num_kv_heads, True
    return (_heads(config), 1, False) if config.multi_query else _by_head(config)


#: By ``model_type``: how many heads of queries, how many of keys and values, and whether groups follow one another.
LAYOUTS: dict[str, Callable[[Any], tuple[int, int, bool]]] = {
    "bloom": _by_head,
    "dbrx": _stacked,
    "falcon": _falcon,
    "gpt2": _stacked,
    "gpt_bigcode": _bigcode,
    "gpt_neox": _by_head,
    "mpt": _stacked,
    "openai-gpt": _stacked,
    "persimmon": _by_head,
    "phi3": _stacked,
}
