"""Fused gated delta rule: a linear-attention module's own forward, with our ops in place of transformers' loops.

Without Triton (flash-linear-attention) transformers runs ``torch_chunk_gated_delta_rule`` and, for single tokens,
``torch_recurrent_gated_delta_rule``, behind ``causal_conv1d_fn``. A module whose forward calls them by name keeps that
forward; the calls go to :func:`inlay.ops.gated_delta_rule` and :func:`inlay.ops.causal_conv1d` where the functions were
proven to compute those, on random fp32 inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.transformers import keeping_warnings_for_later
from ..ops.causal_conv1d import causal_conv1d, has_cuda_kernel
from ..ops.gated_delta_rule import gated_delta_rule, has_own_kernel
from .exchange import called_global, exchanged, innermost
from .mixed import Mixed
from .probe import MAGNITUDES, generator, same, same_at_all_sizes

#: transformers' own normalization of queries and keys has no option for it.
_NORM_EPS = 1e-6
CHUNKED, RECURRENT = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
CONVOLUTION = "causal_conv1d_fn"
#: Their parameters, in order; `chunk_size`, which the recurrent one lacks, is no part of the result.
_PARAMETERS = (
    *("query", "key", "value", "g", "beta", "chunk_size", "initial_state", "output_final_state"),
    *("use_qk_l2norm_in_kernel", "kwargs"),
)
#: Samples of one row that are to be kept apart.
_SAMPLES = ("cu_seqlens", "seq_idx")
#: Of the convolution: transformers' names of what our op has.
_ACTIVATIONS = (None, "silu", "swish")


class FusedDeltaRule(Mixed):
    """Mixin of a module that calls transformers' gated delta rule: its class's own forward, with other functions."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if FusedDeltaRule in cls.__bases__:
            plain: Any = cls._inlay_plain_class.forward
            cls.forward = exchanged(plain, _others(plain)) or plain


def delta_rule_settings(module: nn.Module) -> dict[str, Any] | None:
    """An empty dict for a module that may have :class:`FusedDeltaRule`, else None."""
    forward = type(module).forward
    if "forward" in module.__dict__ or not {CHUNKED, RECURRENT} & set(_others(forward)):
        return None
    return {} if exchanged(forward, {}) is not None else None


def _others(forward: Any) -> dict[str, Callable]:
    """What stands in for the functions that ``forward`` calls: those that are proven to be ours."""
    inner, others = innermost(forward), {}
    for name, (proven, in_place_of) in _KINDS.items():
        function = called_global(forward, name)
        if inner is not None and function is not None and proven(function):
            others[name] = in_place_of(inner.__globals__, name)
    return others


def _keeps_samples_apart(asked: dict[str, Any]) -> bool:
    return any(asked.get(option) is not None for option in _SAMPLES)


def _rule(names: dict[str, Any], name: str) -> Callable:
    """Our op under the signature of transformers' functions; where it does not fit, what ``names`` has then."""
    options = _PARAMETERS[5:-1] if name == CHUNKED else _PARAMETERS[6:-1]

    def rule(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        asked = dict(zip(options, args), **kwargs)
        alike = query.dtype == key.dtype == value.dtype
        if _keeps_samples_apart(asked) or not has_own_kernel(query) or not alike:
            return names[name](query, key, value, g, beta, *args, **kwargs)
        eps = _NORM_EPS if asked.get("use_qk_l2norm_in_kernel") else None
        out, last = gated_delta_rule(query, key, value, g, beta, asked.get("initial_state"), norm_eps=eps)
        return out, last if asked.get("output_final_state") else None

    return rule


def _convolution(names: dict[str, Any], name: str) -> Callable:
    """The same for ``causal_conv1d_fn``, of ``[B, C, T]``."""

    def convolution(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        own = has_own_kernel(hidden_states) or has_cuda_kernel(hidden_states)
        if _keeps_samples_apart(kwargs) or not own or activation not in _ACTIVATIONS:
            return names[name](hidden_states, weight, bias, activation, **kwargs)
        return causal_conv1d(hidden_states.mT, weight, bias, activation is not None).mT

    return convolution


# --- the proofs ----------------------------------------------------------------------------------------------


@cache
def computes_gated_delta_rule(function: Callable) -> bool:
    """True if ``function`` takes and computes what :func:`gated_delta_rule` does, at every size of its inputs."""
    names = tuple(inspect.signature(function).parameters)
    if names != tuple(name for name in _PARAMETERS if name != "chunk_size" or "chunk_size" in names):
        return False
    random = generator()
    with torch.device("cpu"), keeping_warnings_for_later():
        return all(
            same(partial(_theirs, function, inputs, normalize), partial(_ours, inputs, normalize))
            for size in MAGNITUDES
            for normalize in (True, False)
            for inputs in _inputs(size, normalize, random)
        )


def _inputs(size: float, normalize: bool, random: torch.Generator) -> list[tuple[Tensor, ...]]:
    """More tokens than a chunk has, and one; more heads of values than of keys; decays that matter and that do not."""
    made = []
    for tokens, decay in ((70, 0.05), (70, 3.0), (1, 0.5)):
        q, k = (torch.randn(2, tokens, 2, 8, generator=random) for _ in range(2))
        q, k = (q * size, k * size) if normalize else (q * size, torch.nn.functional.normalize(k, dim=-1))
        v, state = torch.randn(2, tokens, 4, 6, generator=random), torch.randn(2, 4, 8, 6, generator=random)
        g, beta = (torch.rand(2, tokens, 4, generator=random) for _ in range(2))
        made.append((q, k, v * size, -decay * g, beta, state * size))
    return made


def _theirs(function: Callable, inputs: tuple[Tensor, ...], normalize: bool) -> Tensor:
    found = []
    for state in (inputs[5], None):
        options = {"initial_state": state, "use_qk_l2norm_in_kernel": normalize}
        out, last = function(*inputs[:5], output_final_state=True, **options)
        found += [out, last]
        if function(*inputs[:5], output_final_state=False, **options)[1] is not None:
            raise ValueError("a state that nobody asked for")
    return torch.cat([t.flatten() for t in found])


def _ours(inputs: tuple[Tensor, ...], normalize: bool) -> Tensor:
    eps = _NORM_EPS if normalize else None
    q, k, v, g, beta, first = inputs
    found = (t for state in (first, None) for t in gated_delta_rule(q, k, v, g, beta, state, norm_eps=eps))
    return torch.cat([t.flatten() for t in found])


@cache
def computes_causal_conv1d(function: Callable) -> bool:
    """True if ``function`` takes and computes what :func:`causal_conv1d` does, of channels in rows."""
    if tuple(inspect.signature(function).parameters) != ("hidden_states", "weight", "bias", "activation", "kwargs"):
        return False
    random = generator()
    x, weight, bias = (torch.randn(size, generator=random) for size in ((2, 6, 9), (6, 4), (6,)))
    with torch.device("cpu"), keeping_warnings_for_later():
        return all(
            same_at_all_sizes(
                partial(_convolved, function, weight, b, act), partial(_convolved_by_us, weight, b, act), x
            )
            for b in (bias, None)
            for act in _ACTIVATIONS
        )


def _convolved(function: Callable, weight: Tensor, bias: Tensor | None, act: str | None, x: Tensor) -> Tensor:
    return function(x, weight, bias, activation=act)


def _convolved_by_us(weight: Tensor, bias: Tensor | None, act: str | None, x: Tensor) -> Tensor:
    return causal_conv1d(x.mT, weight, bias, act is not None).mT


#: By the name of the global: what proves that it is ours, and what makes ours to stand in for it.
_KINDS: dict[str, tuple[Callable, Callable]] = {
    CHUNKED: (computes_gated_delta_rule, _rule),
    RECURRENT: (computes_gated_delta_rule, _rule),
    CONVOLUTION: (computes_causal_conv1d, _convolution),
}
