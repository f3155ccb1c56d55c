"""What inlay relies on inside transformers (5.15 and newer)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def causal_lm_loss(model: nn.Module) -> Callable[..., Any] | None:
    """The model's loss function if it is transformers' causal-LM loss, else None."""
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss
        from transformers.modeling_utils import PreTrainedModel
    except ImportError:
        return None
    if not isinstance(model, PreTrainedModel):
        return None
    # A model class that never calls `self.loss_function` with logits of a causal LM has another loss type.
    loss = getattr(model, "_loss_function", None)
    if loss is None:
        loss_type = getattr(model, "loss_type", None)
        loss = ForCausalLMLoss if loss_type in (None, "ForCausalLM") else None
    return loss if loss is ForCausalLMLoss else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """True for T5-like models."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def checkpoints_reentrantly(block: nn.Module) -> bool:
    """Whether ``block`` runs under reentrant checkpointing, which records nothing if no input requires a gradient."""
    if not (getattr(block, "gradient_checkpointing", False) and block.training):
        return False
    function = getattr(block, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


@contextmanager
def registered_attention(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Register an attention function under ``name`` for the time being."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(name, function)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(name, None)


@contextmanager
def keeping_warnings_for_later() -> Iterator[None]:
    """Within this context nothing is said by ``logger.warning_once``, and nothing counts as said."""
    said: Any = logging.Logger.warning_once  # type: ignore[attr-defined]
    logging.Logger.warning_once = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logging.Logger.warning_once = said  # type: ignore[attr-defined]


def attention_function(module: nn.Module) -> Callable[..., Any]:
    """The attention function the user chose by ``attn_implementation``, as transformers' own modules look it up."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modeling = sys.modules[type(module).__module__]
    functions = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    return functions.get_interface(module.config._attn_implementation, eager_attention(module))


def eager_attention(module: nn.Module) -> Callable[..., Any] | None:
    """The attention of plain torch beside ``module``'s class."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def weights_are_read(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether somebody wants the weights that ``module``, an attention, returns beside its output."""
    if kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)):
        return True
    try:  # what a model's forward sets for the hooks that collect outputs
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return False
    return any("attentions" in key for key in _active_collector.get() or ())
