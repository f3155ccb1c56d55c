"""A tuned model without data: weights on the meta device, tuned by the same code as real ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import BaseConfig
from ..install import DEFAULT_ADAPTER, check_base_fits, check_sites, install
from ..methods import Method
from ..nn import attention, delta_rule
from ..nn.tuned_linear import HOOKS
from ..nn.whole import hidden_tensors
from ..ops.attention import kernel_fits
from ..ops.gated_delta_rule import kernel_fits as rule_fits
from ..planning import completed
from ..state import state_of


def meta_model(source: Any, dtype: torch.dtype | None) -> nn.Module:
    """A model of ``source``'s shapes on the meta device.

    Args:
        source: a module (which is left alone), a transformers config, or the folder or name of one.
        dtype: of its floating-point weights; None leaves a module's, and takes a config's own (else bfloat16).

    Raises:
        TypeError: ``source`` is none of these.
    """
    if isinstance(source, nn.Module):
        return _cast(_meta_copy(source), dtype)
    from transformers import AutoConfig, PretrainedConfig

    config = AutoConfig.from_pretrained(source) if isinstance(source, str | Path) else source
    if not isinstance(config, PretrainedConfig):
        raise TypeError(f"wanted a model, a transformers config or its folder, got {type(source).__name__}")
    return _from_config(config, dtype)


def _from_config(config: Any, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    config = copy.deepcopy(config)
    config.use_cache = False
    held = getattr(config, "dtype", None)
    dtype = dtype or (held if isinstance(held, torch.dtype) else torch.bfloat16)
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        if kind is None:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        return kind._from_config(config, dtype=dtype)


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares no tensor with ``model``, and no hook; tied weights stay tied."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers(), hidden_tensors(model)):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        for hooks in HOOKS:
            setattr(module, hooks, type(getattr(module, hooks))())
    return made


def _cast(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    if dtype is not None:
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return model


def tune_without_data(model: nn.Module, method: Method | None, base: str | BaseConfig | None) -> nn.Module:
    """What :func:`inlay.tune` makes of ``model``, which is on the meta device; ``method`` None for a tuned one.

    Raises:
        ValueError: no method and no tuned model; or as :func:`inlay.tune` does.
    """
    if state_of(model) is not None:
        if method is not None or base is not None:
            raise ValueError("the model is tuned already; leave method and base out, or pass the plain model")
        return model
    if method is None:
        raise ValueError("wanted a method such as inlay.S2FT(ratio=0.03) for a model that is not tuned, got none")
    method = method.without_data()
    config = None if base is None else BaseConfig.of(base)
    method, plan = completed(model, method, method.plan(model, None), config)
    check_sites(model, [site.path for site in plan.pieces], loaded=False)
    pieces = {site.path: build(site.module(model)) for site, build in plan.pieces.items()}
    check_base_fits(model, method, pieces, config)
    if config is not None:
        method.quantize(model, config.leaving(plan.whole), pieces)
    return install(
        model, method, pieces, DEFAULT_ADAPTER, sample={}, base=config, whole=plan.whole, schedule=plan.schedule
    )


def text_batch(model: nn.Module, batch: int, seq: int) -> dict[str, Tensor]:
    """``input_ids`` and ``labels``, ``[batch, seq]``; every token supervised."""
    tokens = torch.zeros(batch, seq, dtype=torch.int64, device="meta")
    return {"input_ids": tokens, "labels": tokens}


@contextmanager
def fused_attention(device: str) -> Iterator[None]:
    """Within this context attention of tensors without data runs by ``device``'s own kernel, torch's or ours.

    Left alone, torch takes the formula for them, which keeps every score. A function mode would be the clean way to
    say so, but torch leaves it for the length of a backward, where checkpointing runs blocks again.
    """
    original, has_kernel = nn.functional.scaled_dot_product_attention, attention.has_own_kernel
    has_rule = delta_rule.has_own_kernel

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type != "meta":
            return original(query, *args, **kwargs)
        return _attend(device, query, *args, **kwargs)

    nn.functional.scaled_dot_product_attention = attend
    if device == "cpu":
        attention.has_own_kernel = lambda q: kernel_fits(q) if q.is_meta else has_kernel(q)
        delta_rule.has_own_kernel = lambda q: rule_fits(q) if q.is_meta else has_rule(q)
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention, attention.has_own_kernel = original, has_kernel
        delta_rule.has_own_kernel = has_rule


def _attend(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if device == "cuda":
        if attn_mask is not None:  # the kernel that takes masks wants as many key heads as queries
            groups = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as torch does, for each call anew
        no, yes = (torch.full((), value, dtype=query.dtype, device="meta") for value in (-torch.inf, 0.0))
        attn_mask = torch.where(attn_mask.logical_not(), no, yes)
    flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash_cpu(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
