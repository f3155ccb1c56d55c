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

from ..integrations.transformers import (
    attention_function,
    eager_attention,
    registered_attention,
    weights_are_read,
)
from ..ops.attention import attention, has_own_kernel
from ..ops.rope import rope
from .mixed import Mixed
from .probe import close, generator, same, same_at_all_sizes, shallow, takes_only
from .rows import RowMask
from .spans import spans_of
from .stack import linears_of
from .wanted import of_a_library

_PROBE = "inlay_probe"
#: What transformers calls the argument for keys and values of earlier tokens: now, and before 5.24.
_CACHE_NAMES = ("cache", "past_key_values")


class FusedAttention(Mixed):
    """Mixin of a rotary attention module with separate q, k, v and o projections."""

    inlay_same_input = ("q_proj", "k_proj", "v_proj")
    inlay_attention_kwargs: dict[str, Any]
    inlay_sinks: str | None  # the parameter that the attention function is handed as `s_aux`, a logit per head
    inlay_half_angles: bool  # cos and sin come for one half of the channels, and hold for both
    inlay_eager: bool  # the module's eager attention is what ours computes, and torch has no other for it
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
        if position_embeddings is None:  # a layer that rotates nothing
            past = {"cache": cache, "past_key_values": past_key_values}
            kwargs |= {name: value for name, value in past.items() if value is not None}
            return super().forward(hidden_states, position_embeddings=None, attention_mask=attention_mask, **kwargs)
        cos, sin = position_embeddings
        query, key, value = rotated_qkv(self, hidden_states, cos, sin, self.inlay_half_angles)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            with_kwargs = {"kwargs": kwargs} if self.inlay_cache_takes_kwargs else {}
            key, value = cache.update(key, value, self.layer_idx, **with_kwargs)
        dropout = self.inlay_dropout if self.training else 0.0
        extra = {**self.inlay_attention_kwargs, **kwargs}
        if self.inlay_sinks is not None:
            extra["s_aux"] = getattr(self, self.inlay_sinks)
        own, spans = dropout == 0.0 and own_attention_pays(self, (query, key, value), attention_mask, extra), None
        if own:
            own, spans = spans_seen(self, attention_mask, query, key, extra.get("sliding_window"))
        if own:
            scale, softcap, sinks = (extra.get(name) for name in ("scaling", "softcap", "s_aux"))
            output = attention(query, key, value, scale, spans, softcap, sinks)
            output, weights = output.transpose(1, 2), None
        else:
            if isinstance(attention_mask, RowMask):
                attention_mask = self._written(attention_mask, query.dtype, extra.get("sliding_window"))
            attend = attention_function(self)
            output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, **extra)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def _written(self, mask: RowMask, dtype: torch.dtype, window: int | None) -> Tensor:
        """The mask of a row as the module's attention function takes it: eager ones add it to the scores."""
        seen = mask.mask(window)
        if self.config._attn_implementation != "eager":
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


#: Arguments of attention modules that the fused block takes or hands on to the attention function.
_ARGUMENTS = (
    *("position_embeddings", "attention_mask", "cache_position", "position_ids", "output_attentions", "use_cache"),
    *(*_CACHE_NAMES, "kwargs"),
)
_PROJECTIONS = (*FusedAttention.inlay_same_input, "o_proj")


def own_attention_pays(
    module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, extra: dict[str, Any]
) -> bool:
    """True where our own kernels compute what the user's choice would, and are faster.

    Where SDPA was asked for that is where a gradient will be asked for, or samples lie in one row, of whose scores
    torch would form the square. Without a mask transformers' SDPA is causal unless told otherwise; a sliding window
    that matters comes as a mask. Where nothing but eager attention knows the scores' soft cap or sinks, it is wherever
    nobody reads the weights.
    """
    query, key, _ = qkv
    if not has_own_kernel(query) or any(extra.get(name) is not None for name in ("position_bias", "cache")):
        return False
    implementation = module.config._attn_implementation
    if implementation == "eager":
        return module.inlay_eager and not weights_are_read(module, extra) and not _watched(module)
    causal = query.shape[2] == key.shape[2] > 1 and extra.get("is_causal", getattr(module, "is_causal", True))
    return (
        implementation == "sdpa"
        and (isinstance(mask, RowMask) or any(t.requires_grad for t in qkv))
        and (mask is not None or causal in (True, None))
        and extra.get("softcap") is None
        and extra.get("s_aux") is None
    )


def _watched(module: nn.Module) -> bool:
    """Whether a hook of the user's sees the weights that ``module`` returns."""
    return not all(of_a_library(hook) for hook in module._forward_hooks.values())


def spans_seen(
    module: nn.Module, mask: Tensor | None, query: Tensor, key: Tensor, window: int | None
) -> tuple[bool, Tensor | None]:
    """Whether ``mask`` says stretches of keys, and those, as :func:`inlay.ops.attention` takes them."""
    if isinstance(mask, RowMask):
        return True, mask.spans(window)
    if mask is not None:
        spans = spans_of(mask)
        return spans is not None, spans
    if module.config._attn_implementation != "eager":
        return True, None
    every = torch.tensor([0, key.shape[2]], device=query.device)  # nothing is added to any score
    return True, every.expand(1, query.shape[2], 2)


def rotated_qkv(
    module: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, half_angles: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, heads, T, head_dim]`` of ``x [B, T, H]``, the first two rotated."""
    shape = (*x.shape[:-1], -1, module.head_dim)
    projections = [getattr(module, name) for name in FusedAttention.inlay_same_input]
    # Apart: values are kept for the backward, queries and keys only after they are rotated.
    query, key, value = (y.view(shape) for y in linears_of(x, projections, apart=True))
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    if half_angles:
        cos, sin = (torch.cat((angles, angles), dim=-1) for angles in (cos, sin))
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
    for half_angles in (False, True):
        settings = _settings_of(module, cache_name, half_angles)
        if settings is not None:
            return settings
    return None


def _settings_of(module: nn.Module, cache_name: str, half_angles: bool) -> dict[str, Any] | None:
    twin, x, embeddings = _twin(module, half_angles)
    cache = _Doubled()
    seen: dict[bool, dict[str, Any]] = {}
    mask = torch.zeros(x.shape[0], 1, x.shape[1], x.shape[1])

    def record(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any):
        seen[twin.training] = {"qkv": (query, key, value), "mask": mask, "kwargs": kwargs}
        heads = query.transpose(1, 2)
        return heads * 1.5, None

    def ours(x: Tensor) -> Tensor:
        query, key, value = rotated_qkv(twin, x, *embeddings, half_angles)
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
    sinks = next((name for name, held in twin._parameters.items() if held is extra.get("s_aux", twin)), None)
    if sinks is not None:
        extra.pop("s_aux")
    if not isinstance(dropout, float) or any(isinstance(value, Tensor) for value in extra.values()):
        return None  # a bias of scores: not ours to pass on
    if not cache.keywords <= {"kwargs"}:
        return None
    return {
        "inlay_attention_kwargs": extra,
        "inlay_cache_takes_kwargs": "kwargs" in cache.keywords,
        "inlay_dropout": dropout,
        "inlay_sinks": sinks,
        "inlay_half_angles": half_angles,
        "inlay_eager": (sinks is not None or extra.get("softcap") is not None) and _eager_is_ours(twin, extra, sinks),
    }


def _eager_is_ours(twin: nn.Module, extra: dict[str, Any], sinks: str | None) -> bool:
    """Whether the module's eager attention gives what ours does, under masks of every kind that eager ones get.

    In float64, where ours runs by its reference: only the formula is in question, and the kernels are tested by that.
    """
    attend, random = eager_attention(twin), generator()
    if attend is None:
        return False
    groups = getattr(twin, "num_key_value_groups", 1)
    tokens, heads = 9, twin.q_proj.out_features // twin.head_dim
    query, key, value = (
        torch.randn(2, count, tokens, twin.head_dim, generator=random, dtype=torch.float64)
        for count in (heads, heads // groups, heads // groups)
    )
    logits = {} if sinks is None else {"s_aux": getattr(twin, sinks)}
    causal = torch.ones(2, 1, tokens, tokens).tril().bool()
    padded = causal.clone()
    padded[1, ..., 5:] = False
    lowest = torch.finfo(torch.float32).min

    def theirs(seen: Tensor, query: Tensor) -> Tensor:
        added = torch.zeros(seen.shape).masked_fill(~seen, lowest)
        return attend(twin, query, key, value, added, dropout=0.0, **extra, **logits)[0]

    def ours(seen: Tensor, query: Tensor) -> Tensor:
        scale, softcap = extra.get("scaling"), extra.get("softcap")
        return attention(query, key, value, scale, spans_of(seen), softcap, logits.get("s_aux")).transpose(1, 2)

    masks = (causal, causal & ~causal.tril(-3), padded, torch.ones_like(causal))
    sizes = (0.0, 1e-3, 1.0, 30.0)  # what some form in fp32 is exact enough up to there
    return all(
        same(partial(theirs, seen, query * size), partial(ours, seen, query * size)) for seen in masks for size in sizes
    )


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


def _twin(module: nn.Module, half_angles: bool) -> tuple[nn.Module, Tensor, tuple[Tensor, Tensor]]:
    """``module`` with random fp32 parameters of its own shapes, an input, and rotary embeddings."""
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
    held = {name: p for name, p in module._parameters.items() if p is not None}
    twin = shallow(module, children, {name: torch.randn(p.shape, generator=random) for name, p in held.items()})
    config = copy.copy(module.config)
    config._attn_implementation_internal = _PROBE
    twin.__dict__["config"] = config
    x = torch.randn(2, 5, children["q_proj"].in_features, generator=random)
    angles = torch.rand(2, 5, module.head_dim // 2, generator=random) * 6.3
    angles = angles if half_angles else torch.cat((angles, angles), dim=-1)
    return twin, x, (angles.cos(), angles.sin())
