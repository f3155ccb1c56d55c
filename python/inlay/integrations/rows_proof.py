"""Proof that a model keeps samples of one row apart: by their lengths, or by positions that restart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.attention import FusedAttention
from ..nn.head import FusedCausalLoss, losses_only
from ..nn.modes import evaluating
from ..nn.rows import RowMask
from ..nn.spans import spans_of
from ..ops.attention import has_own_kernel, mask_of
from .transformers import causal_lm_loss, is_encoder_decoder

#: Masks of this many tokens are compared at most: they grow with the square of it.
LONGEST_PROOF = 8192


def why_not_at_all(model: nn.Module) -> str | None:
    """Why a row could not have the batch's loss, whatever the attention does."""
    if is_encoder_decoder(model):
        return "it is an encoder-decoder"
    if not isinstance(getattr(model, "_loss_function", None), FusedCausalLoss) and causal_lm_loss(model) is None:
        return "its loss is not transformers' causal-LM loss"
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        return "a loss over the routing of all tokens is added to it"
    return None


def why_not_by_lengths(model: nn.Module, longest: int) -> str | None:
    """Why samples of up to ``longest`` tokens cannot run by their lengths in one row; None where that is proven.

    The row's masks must be, exactly, those that transformers makes for it in every attention block, nobody else may
    look at them, and a sample's logits must be those it has alone.
    """
    blocks = [module for module in model.modules() if isinstance(module, FusedAttention)]
    if (reason := why_not_at_all(model)) is not None:
        return reason
    if not blocks:
        return "its attention is not one that inlay computes"
    implementation = blocks[0].config._attn_implementation
    if implementation != "sdpa" and not (implementation == "eager" and all(block.inlay_eager for block in blocks)):
        return f"its attention is {implementation!r}; inlay's runs in the place of 'sdpa'"
    if any(block.inlay_dropout for block in blocks):
        return "its attention drops out scores"
    weight = next(model.parameters())
    if not has_own_kernel(weight.new_empty(1, 1, 1, blocks[0].head_dim)):
        return f"no kernel of inlay's computes attention of {weight.dtype} on this {weight.device.type}"
    try:
        with _evaluating(model):
            return _samples_mix(model) or _masks_differ(model, blocks, longest)
    except Exception as error:
        return f"it does not run with samples in one row ({type(error).__name__}: {' '.join(str(error).split())})"


def leaves_logits(model: nn.Module) -> bool:
    """Whether the fused loss finds logits that the model has done something to, and which it therefore keeps."""
    from ..data.room import plain_tokens

    loss: Any = model._loss_function
    ids, last = plain_tokens(model, (1, 4), torch.Generator().manual_seed(0)), loss.last
    ids = ids.to(next(model.parameters()).device)
    try:
        with _evaluating(model), losses_only(model):
            model(input_ids=ids, labels=ids, use_cache=False)
        return loss.last != "fused"
    except Exception:
        return True  # it wants another input; the first training forward will tell
    finally:
        loss.last = last


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield


def why_not_by_positions(model: nn.Module) -> str | None:
    """Why restarting positions do not keep samples of one row apart; None where that was tried."""
    from ..data.packing import check_samples_stay_apart

    try:
        with _evaluating(model):
            check_samples_stay_apart(model)
    except Exception as error:
        return " ".join(str(error).split())
    return None


def _samples_mix(model: nn.Module) -> str | None:
    from ..data.packing import logits_of_neighbours

    masks: list[RowMask] = []

    def mask(starts: Tensor) -> RowMask:
        masks.append(RowMask(starts))
        return masks[-1]

    leak, shift = logits_of_neighbours(model, mask=mask)
    if leak > 1e-3 or shift > 5e-2:
        return f"samples of one row see each other (logits change by {max(leak, shift):.1%} with the neighbour)"
    if any(mask.written for mask in masks):
        return "part of it reads masks, which would be of the square of a batch's tokens"
    return None


def _masks_differ(model: nn.Module, blocks: list[Any], longest: int) -> str | None:
    """Compare what transformers hands each attention block for two samples in a row with what the row's mask says."""
    from ..data.room import plain_tokens

    lengths = (longest, 6)
    starts = torch.cat([torch.full((n,), start) for n, start in zip(lengths, (0, longest))])
    row, count, seen = RowMask(starts), sum(lengths), []
    differ = "it masks something else than other samples, later tokens and a window"

    def look(block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask: Any = kwargs.get("attention_mask")
        window = block.inlay_attention_kwargs.get("sliding_window")
        wanted = None if mask is None else spans_of(mask)
        same = wanted is not None and torch.equal(mask_of(wanted, count, count, mask.device), row.mask(window))
        seen.append(bool(same))

    handles = [block.register_forward_pre_hook(look, with_kwargs=True) for block in blocks]
    try:
        ids = plain_tokens(model, (1, count), torch.Generator().manual_seed(0))
        positions = torch.arange(count) - starts
        model(input_ids=ids, position_ids=positions[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return None if len(seen) == len(blocks) and all(seen) else differ
