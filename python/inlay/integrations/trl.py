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

logger = logging.getLogger(__name__)

#: Models that were asked whether they separate packed samples: the answer by attention implementation.
_separates: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()
_told: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

#: Describe packing to varlen kernels; a probe must carry what the real call carries.
_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


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
    if model in _told:
        return
    head = model.get_output_embeddings()
    if isinstance(head, TunedLinear) and head.active_deltas():
        raise ValueError(
            "TRL computes the loss from lm_head.weight without calling lm_head: wanted an adapter that leaves the "
            "output head alone, got a delta on it, which would never train; add lm_head to exclude_modules"
        )
    _told[model] = True
    logger.warning("inlay: loss: TRL's own (chunked, from lm_head.weight); inlay's fused loss is not in use")


def is_packed(positions: Tensor, mask: Any) -> bool:
    """Whether positions ``[B, T]`` restart inside a row, padding (where ``mask [B, T]`` is 0) aside."""
    if positions.dim() != 2 or positions.shape[1] < 2:
        return False
    restarts = positions.diff(dim=-1) != 1
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        restarts = restarts & (mask[:, 1:] != 0)
    return bool(restarts.any())


def _check_separation(model: Any, kwargs: Mapping[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        raise ValueError(
            "position_ids restart inside a row, so several samples are packed into it, but a two-dimensional "
            "attention_mask came with them, and then they see each other: wanted no attention_mask; leave it out, or "
            "use packing=False"
        )
    if mask is not None:  # spells out who sees whom
        return
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    answers = _separates.setdefault(model, {})
    if implementation not in answers:
        answers[implementation] = separates_packed(model, kwargs)
    if not answers[implementation]:
        raise ValueError(
            f"samples are packed into rows, but {type(model).__name__} with attn_implementation={implementation!r} "
            "lets a sample see those before it in its row; use packing=False (and padding_free=False), or another "
            "attn_implementation"
        )


@torch.no_grad()
def separates_packed(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Run two packed rows that differ in their first sample: True if the second sample's outputs are the same.

    Proof by probing, as for the fused blocks: no list of attention implementations is kept.
    """
    ids = kwargs.get("input_ids")
    backbone = getattr(model, "base_model", None)
    if not isinstance(ids, Tensor) or not isinstance(backbone, nn.Module):
        return True  # embeddings were passed, or no transformer: nothing is known
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        first, second = (_second_sample(backbone, ids, start, kwargs) for start in (0, 2))
    finally:
        for module, training in modes.items():
            module.training = training
    # The same products in the same order: what differs beyond rounding was seen by attention.
    allowed = max(2 * torch.finfo(first.dtype).eps, 1e-5) * first.abs().max()
    return bool((first - second).abs().max() <= allowed)


def _second_sample(backbone: nn.Module, ids: Tensor, start: int, kwargs: Mapping[str, Any]) -> Tensor:
    """Outputs for tokens ``[4, 5]`` packed behind ``[start, start + 1]``, two positions each."""
    row = torch.tensor([[start, start + 1, 4, 5]], device=ids.device, dtype=ids.dtype)
    positions = torch.tensor([[0, 1, 0, 1]], device=ids.device)
    bounds = torch.tensor([0, 2, 4], device=ids.device, dtype=torch.int32)
    samples = torch.tensor([[0, 0, 1, 1]], device=ids.device, dtype=torch.int32)
    varlen = dict(zip(_VARLEN, (bounds, bounds, 2, 2, samples)))
    extra = {name: value for name, value in varlen.items() if name in kwargs}
    return backbone(input_ids=row, position_ids=positions, use_cache=False, **extra)[0][:, 2:]
