"""Fused attention block: projections, norms of queries and keys if the module has them, one rotary op, the user's
attention implementation, output projection.

Whether a module may be fused is proven by running it: an attention function that only records its arguments stands in
for the real one, and what it receives (queries, keys, values, scaling, window, ...) must be what the fused block hands
on. Those extra arguments are kept as the module gave them.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.transformers import attention_function, registered_attention
from ..ops.attention import attention, has_own_kernel
from ..ops.rope import rope
from .mixed import Mixed
from .probe import close, generator, same_at_all_sizes, shallow, takes_only
from .rows import RowMask
from .spans import spans_of
from .stack import linears_of

_PROBE = "inlay_probe"
#: What transformers calls the argument for keys and values of earlier tokens: now, and before 5.24.
_CACHE_NAMES = ("cache", "past_key_values")


class FusedAttention(Mixed):
    """Mixin of a rotary attention module with separate q, k, v and o projections."""

    inlay_same_input = ("q_proj", "k_proj", "v_proj")
    inlay_attention_kwargs: dict[str, Any]
    inlay_cache_takes_kwargs: bool  # a paged cache writes into them what the attention function is to read
    inlay_dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert position_embeddings is not None, "rotary attention wants position_embeddings"
        cos, sin = position_embeddings
        query, key, value = rotated_qkv(self, hidden_states, cos, sin)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            with_kwargs = {"kwargs": kwargs} if self.inlay_cache_takes_kwargs else {}
            key, value = cache.update(key, value, self.layer_idx, **with_kwargs)
        dropout = self.inlay_dropout if self.training else 0.0
        extra = {**self.inlay_attention_kwargs, **kwargs}
        own, spans = dropout == 0.0 and own_attention_pays(self, (query, key, value), attention_mask, extra), None
        if own and isinstance(attention_mask, RowMask):
            spans = attention_mask.spans(extra.get("sliding_window"))
        elif own and attention_mask is not None:
            spans = spans_of(attention_mask)
            own = spans is not None
        elif isinstance(attention_mask, RowMask):
            attention_mask = attention_mask.mask(extra.get("sliding_window"))
        if own:
            output, weights = attention(query, key, value, extra.get("scaling"), spans).transpose(1, 2), None
        else:
            attend = attention_function(self)
            output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, **extra)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


#: Arguments of attention modules that the fused block takes or hands on to the attention function.
_ARGUMENTS = (
    *("position_embeddings", "attention_mask", "cache_position", "position_ids", "output_attentions", "use_cache"),
    *(*_CACHE_NAMES, "kwargs"),
)
_PROJECTIONS = (*FusedAttention.inlay_same_input, "o_proj")


def own_attention_pays(
    module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, extra: dict[str, Any]
) -> bool:
    """True where SDPA was asked for, and our own kernels are faster for what the mask says: where a gradient will be
    asked for, or samples lie in one row, of whose scores torch would form the square.

    Without a mask transformers' SDPA is causal unless told otherwise; a sliding window that matters comes as a mask.
    """
    query, key, _ = qkv
    causal = query.shape[2] == key.shape[2] > 1 and extra.get("is_causal", getattr(module, "is_causal", True))
    return (
        module.config._attn_implementation == "sdpa"
        and (isinstance(mask, RowMask) or any(t.requires_grad for t in qkv))
        and has_own_kernel(query)
        and (mask is not None or causal in (True, None))
        and not any(extra.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    )


def rotated_qkv(module: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, heads, T, head_dim]`` of ``x [B, T, H]``, the first two rotated."""
    shape = (*x.shape[:-1], -1, module.head_dim)
    projections = [getattr(module, name) for name in FusedAttention.inlay_same_input]
    # Apart: values are kept for the backward, queries and keys only after they are rotated.
    query, key, value = (y.view(shape) for y in linears_of(x, projections, apart=True))
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    query, key = rope(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    return query, key, value.transpose(1, 2)


def attention_settings(module: nn.Module) -> dict[str, Any] | None:
    """The settings of a module that :class:`FusedAttention` computes, or None."""
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in _PROJECTIONS):
        return None
    if not isinstance(getattr(module, "head_dim", None), int) or getattr(module, "config", None) is None:
        return None
    if hasattr(module, "q_norm") != hasattr(module, "k_norm"):
        return None
    cache_name = next((n for n in _CACHE_NAMES if n in inspect.signature(type(module).forward).parameters), None)
    if cache_name is None or not isinstance(getattr(module, "layer_idx", None), int):
        return None  # a cache under a name we do not know would be passed over, and decoding be wrong
    if not takes_only(module, _ARGUMENTS):
        return None
    twin, x, embeddings = _twin(module)
    cache = _Doubled()
    seen: dict[bool, dict[str, Any]] = {}
    mask = torch.zeros(x.shape[0], 1, x.shape[1], x.shape[1])

    def record(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any):
        seen[twin.training] = {"qkv": (query, key, value), "mask": mask, "kwargs": kwargs}
        heads = query.transpose(1, 2)
        return heads * 1.5, None

    def ours(x: Tensor) -> Tensor:
        query, key, value = rotated_qkv(twin, x, *embeddings)
        key, value = cache.doubled(key, value, twin.layer_idx)
        if not all(close(a, b) for a, b in zip(seen[False]["qkv"], (query, key, value))):
            raise ValueError("queries, keys or values differ")
        return twin.o_proj((query.transpose(1, 2) * 1.5).reshape(*x.shape[:-1], -1))

    def theirs(training: bool, mask: Tensor | None, x: Tensor) -> Tensor:
        twin.training = training
        past = {cache_name: cache}
        out = twin(hidden_states=x, position_embeddings=embeddings, attention_mask=mask, **past)[0]
        if seen[training]["mask"] is not mask:
            raise ValueError("the mask is not handed on as it is")
        return out

    with registered_attention(_PROBE, record):
        for given in (mask, None):
            evaluating = partial(theirs, False, given)
            if not same_at_all_sizes(partial(theirs, True, given), evaluating, x):
                return None
            if not same_at_all_sizes(evaluating, ours, x):
                return None
        theirs(True, None, x)
    extra = dict(seen[False]["kwargs"])
    dropout = seen[True]["kwargs"].get("dropout", 0.0)
    extra.pop("dropout", None)
    if not isinstance(dropout, float) or any(isinstance(value, Tensor) for value in extra.values()):
        return None  # a per-head sink or bias: not ours to pass on
    if not cache.keywords <= {"kwargs"}:
        return None
    return {
        "inlay_attention_kwargs": extra,
        "inlay_cache_takes_kwargs": "kwargs" in cache.keywords,
        "inlay_dropout": dropout,
    }


class _Doubled:
    """Stands in for a cache: what it hands back shows whether, and with what, it was asked."""

    def __init__(self) -> None:
        self.keywords: set[str] = set()  # of the module's calls

    def update(self, key: Tensor, value: Tensor, layer: int, **keywords: Any) -> tuple[Tensor, Tensor]:
        self.keywords |= set(keywords)
        return self.doubled(key, value, layer)

    @staticmethod
    def doubled(key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return key * (2.0 + layer), value * (3.0 + layer)


def _twin(module: nn.Module) -> tuple[nn.Module, Tensor, tuple[Tensor, Tensor]]:
    """``module`` with random fp32 projections of its own shapes, an input, and rotary embeddings."""
    random, children = generator(), {}
    for name in _PROJECTIONS:
        linear = getattr(module, name)
        held = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        for parameter in held.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.1
        children[name] = held
    for name in ("q_norm", "k_norm"):
        if hasattr(module, name):
            children[name] = held = copy.deepcopy(getattr(module, name)).to_empty(device="cpu").float()
            for parameter in held.parameters():
                parameter.data = torch.randn(parameter.shape, generator=random) * 0.1 + 1.0
    twin = shallow(module, children, {})
    config = copy.copy(module.config)
    config._attn_implementation_internal = _PROBE
    twin.__dict__["config"] = config
    x = torch.randn(2, 5, children["q_proj"].in_features, generator=random)
    angles = torch.rand(2, 5, module.head_dim // 2, generator=random) * 6.3
    angles = torch.cat((angles, angles), dim=-1)
    return twin, x, (angles.cos(), angles.sin())
