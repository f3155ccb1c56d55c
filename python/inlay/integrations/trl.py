"""What inlay says when TRL's trainers run a model: which loss ran, and what would silently go wrong.

SFTTrainer computes the loss itself, from the backbone's output and the head's weight, with a forward of its own that it
puts on the model. Nothing of that is changed here: a hook on the model looks at what a training forward was given.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..nn.tuned_linear import TunedLinear
from ..ties import is_tied

logger = logging.getLogger(__name__)

#: Models whose packed samples were found to stay apart, by attention implementation.
_apart: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()
#: Models about whose loss the log has a line.
_told: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def watch(model: nn.Module) -> RemovableHandle:
    """Check every training forward of ``model``; see :func:`check_call`. Removed by the returned handle."""
    return model.register_forward_pre_hook(check_call, with_kwargs=True)


def check_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Look at the arguments of a training forward.

    Raises:
        ValueError: TRL computes the loss and would bypass a delta on the output head; or samples are packed into rows
            and the model lets them see each other.
    """
    if not model.training or torch.compiler.is_compiling():
        return
    if kwargs.get("fused_lm_head"):
        _check_head(model)
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if isinstance(positions, Tensor) and is_packed(positions, mask):
        _check_separation(model, kwargs)


def _check_head(model: Any) -> None:
    """TRL reads ``lm_head.weight`` and never calls the head."""
    head = model.get_output_embeddings()
    active = head.active_deltas() if isinstance(head, TunedLinear) else []
    if any(is_tied(piece) for piece in active):
        raise ValueError(
            "TRL computes the loss from lm_head.weight without calling lm_head, which is tied to embeddings that "
            "train: their change would be missing; use inlay.finetune or transformers' Trainer, or train the tables "
            'whole (modules_to_save=["embed_tokens", "lm_head"])'
        )
    if active:
        raise ValueError(
            "TRL computes the loss from lm_head.weight without calling lm_head: wanted an adapter that leaves the "
            "output head alone, got a delta on it, which would never train; add lm_head to exclude_modules"
        )
    if model in _told:
        return
    _told[model] = True
    logger.warning("inlay: loss: TRL's own (chunked, from lm_head.weight); inlay's fused loss is not in use")


def is_packed(positions: Tensor, mask: Any) -> bool:
    """Whether positions ``[B, T]`` restart inside a row, padding (where ``mask [B, T]`` is 0) aside."""
    if positions.dim() != 2 or positions.shape[1] < 2:
        return False
    restarts = positions.diff(dim=-1) != 1
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        restarts = restarts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return bool(restarts.any())


def _check_separation(model: Any, kwargs: Mapping[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        raise ValueError(
            "position_ids restart inside a row, so several samples are packed into it, but a two-dimensional "
            "attention_mask came with them, and then they see each other: wanted no attention_mask; leave it out, or "
            "use packing=False"
        )
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    known = _apart.setdefault(model, set())
    if mask is not None or implementation is None or implementation in known:
        return  # a mask of more dimensions spells out who sees whom
    from ..data.packing import check_samples_stay_apart

    check_samples_stay_apart(model)
    known.add(implementation)
