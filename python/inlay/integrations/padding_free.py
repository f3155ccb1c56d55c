"""Training without padding: a padded batch runs as one row of its real tokens, each sample by its own length.

What transformers' ``DataCollatorWithFlattening`` and TRL's ``padding_free`` do in the collator is done here where the
model is called, so that every trainer gets it, and what trainers count of their batches stays as it is. The loss is
that of the padded batch: tokens keep their positions, see their own sample up to themselves (:class:`RowMask`), and
the first one of a sample has no label, because what would predict it belongs to another sample.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.masking import IGNORED
from ..nn.head import FusedCausalLoss, computes_losses_only
from ..nn.rows import RowMask
from ..nn.wanted import of_a_library
from ..pieces import Piece
from ..sharding import is_sharded
from .rows_proof import LONGEST_PROOF, leaves_logits, why_not_at_all, why_not_by_lengths, why_not_by_positions

logger = logging.getLogger(__name__)

#: Arguments that a row can be made of, and what others must be for it.
_TAKEN = {"input_ids", "attention_mask", "labels", "position_ids", "num_items_in_batch"}
_HARMLESS: dict[str, Any] = {"use_cache": (None, False), "return_dict": (None, True)}
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def row_width(tokens: int) -> int:
    """Positions of the row that ``tokens`` real ones are run in: at most 1.6% more, or 7, so that shapes recur.

    Libraries keep code, and the heap holes, for every shape of a product that they meet.
    """
    multiple = max(8, 1 << max(0, (tokens // 64).bit_length() - 1))
    return -(-tokens // multiple) * multiple


@dataclass
class Row:
    """One row of the real tokens of a batch, ``[1, N]`` each, and what puts results back in their places."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    starts: Tensor  # int64 [N]: where each token's sample begins
    real: Tensor  # bool [B, T]: where the tokens stood

    def arguments(self, by_lengths: bool) -> dict[str, Any]:
        """Of the model's forward."""
        mask = RowMask(self.starts) if by_lengths else None
        given = {"input_ids": self.input_ids, "labels": self.labels, "position_ids": self.position_ids}
        return {**given, "attention_mask": mask, "use_cache": False}  # with a cache no restart is looked for

    def back(self, values: Tensor) -> Tensor:
        """``values [1, N, D]`` at ``[B, T, D]``, zero at padding."""
        whole = values.new_zeros(*self.real.shape, values.shape[-1])
        return whole.masked_scatter(self.real[..., None], values[0, : int(self.real.sum())])


def row_of(ids: Tensor, labels: Tensor, mask: Tensor, positions: Tensor | None = None) -> Row | None:
    """The real tokens of a padded batch, each ``[B, T]``, as one row.

    None where the row would not have the batch's loss, or nothing would be saved: gaps inside a sample, labels on
    padding or predicted from padding, rows (almost) without padding.
    """
    real = mask != 0
    tokens, width = int(real.sum()), ids.shape[1]
    if not tokens or row_width(tokens) >= ids.numel():
        return None
    first = real & ~nn.functional.pad(real, (1, 0))[:, :-1]
    if bool((first.sum(1) > 1).any()) or _predicted_from_padding(labels, real, first):
        return None
    where = torch.arange(width, device=ids.device).expand_as(ids) if positions is None else positions.expand_as(ids)
    begins = first[real].nonzero().squeeze(-1)
    starts = begins[first[real].cumsum(0) - 1]
    filler = row_width(tokens) - tokens  # one more sample, of which nothing is learnt

    def row(values: Tensor, fill: Any) -> Tensor:
        return nn.functional.pad(values[real], (0, filler), value=fill)[None]

    return Row(
        row(ids, int(ids[real][0])),
        row(labels.masked_fill(first, IGNORED), IGNORED),
        row(where, 0),
        nn.functional.pad(starts, (0, filler), value=tokens),
        real,
    )


def _predicted_from_padding(labels: Tensor, real: Tensor, first: Tensor) -> bool:
    supervised = labels != IGNORED
    late = first.clone()
    late[:, 0] = False  # nothing predicts the first column in any case
    return bool((supervised & (~real | late)).any())


class PaddingFree:
    """The setting of a tuned model, and the hook that acts on it.

    Attributes:
        mode: "auto" (where samples are proven to run by their lengths), True (also by restarting positions, through a
            mask of the square of the tokens; an error where neither is proven) or False.
        computed: positions that the last forward ran in a row, None if it ran as it was given.
    """

    def __init__(self) -> None:
        self.mode: bool | str = "auto"
        self.computed: int | None = None
        self._leaves_logits: bool | None = None
        self._unread = False
        self._proofs: dict[tuple, tuple[int, str | None]] = {}
        self._told: set[str] = set()

    def set(self, mode: bool | str) -> None:
        """``padding_free`` as the user gives it."""
        if mode not in (True, False, "auto"):
            raise ValueError(f'padding_free: wanted "auto", True or False, got {mode!r}')
        self.mode = mode

    def why_not(self, model: nn.Module, longest: int) -> str | None:
        """Why batches of up to ``longest`` tokens a sample keep their padding, None if they lose it.

        Raises:
            ValueError: padding_free=True, and the model is not proven to keep samples of one row apart.
        """
        if self.mode is False:
            return "padding_free=False"
        if any(isinstance(module, Piece) and module.draws_by_sample for module in model.modules()):
            drawn = "a piece draws random numbers for whole samples"
            if self.mode is True:
                raise ValueError(
                    f'padding_free=True: {drawn}, and a row has one; leave it out ("auto" keeps the padding)'
                )
            return drawn
        reason = self._by_lengths(model, longest)
        if reason is not None and self.mode is True:
            self._demand_by_positions(model)
            return None
        return reason

    def manner(self, model: nn.Module, longest: int) -> str:
        """How samples run that have lost their padding, in words."""
        if self._by_lengths(model, longest) is None:
            return "samples run by their lengths in one row"
        return "samples run in one row, kept apart by a mask of the square of its tokens"

    def _by_lengths(self, model: nn.Module, longest: int) -> str | None:
        weight = next(model.parameters())
        key = (getattr(getattr(model, "config", None), "_attn_implementation", None), weight.device, weight.dtype)
        proven, reason = self._proofs.get(key, (-1, None))
        if longest <= proven or reason is not None:
            return reason
        if longest > LONGEST_PROOF:
            return f"samples of {longest} tokens are longer than what masks are compared for, {LONGEST_PROOF}"
        if is_sharded(weight):
            return "its weights are sharded, and it was not tried before"
        reason = why_not_by_lengths(model, longest)
        self._proofs[key] = (longest, reason)
        return reason

    def _demand_by_positions(self, model: nn.Module) -> None:
        key = ("by positions", getattr(getattr(model, "config", None), "_attn_implementation", None))
        if key not in self._proofs:
            reason = why_not_at_all(model) or why_not_by_positions(model)
            if reason is not None:
                raise ValueError(
                    f"padding_free=True: wanted a model whose samples stay apart in one row, got "
                    f'{type(model).__name__}: {reason}; leave it out ("auto" keeps the padding where it has to)'
                )
            self._proofs[key] = (0, None)

    def drop(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook of the model: the batch without its padding, where nobody could tell but by the time."""
        self.computed = None
        if self.mode is False or torch.compiler.is_compiling() or args:
            return None
        if self.mode == "auto" and not next(model.parameters()).is_cpu:
            return None  # where lengths are not run by; and a look at the mask would wait for the device
        if not _is_padded(kwargs):
            return None
        if not (model.training and torch.is_grad_enabled()) and not computes_losses_only(model):
            return None  # somebody reads the logits
        if (seen := why_shapes_matter(model, kwargs)) is not None:
            self._tell(f"padding stays: {seen}")
            return None
        if self.mode == "auto" and self._logits_may_be_read(model):
            self._tell("padding stays: the loss leaves logits, which somebody may read")
            return None
        longest = 1 << (kwargs["input_ids"].shape[1] - 1).bit_length()
        if (reason := self.why_not(model, longest)) is not None:
            self._tell(f"padding stays: {reason}")
            return None
        row = row_of(*(kwargs.get(name) for name in ("input_ids", "labels", "attention_mask", "position_ids")))
        if row is None:
            return None
        self._tell(f"padding is dropped: {self.manner(model, longest)}")
        self.computed = row.input_ids.numel()
        _put_logits_back(model, row)
        return args, {**kwargs, **row.arguments(self._by_lengths(model, longest) is None)}

    @contextmanager
    def only_the_loss(self) -> Iterator[None]:
        """Within this context nothing but the loss is read. Elsewhere somebody may read logits wherever the loss leaves
        any, those at padding too, which a row does not compute; there "auto" leaves padding in."""
        self._unread, before = True, self._unread
        try:
            yield
        finally:
            self._unread = before

    def _logits_may_be_read(self, model: nn.Module) -> bool:
        if self._unread or computes_losses_only(model):
            return False
        if not isinstance(getattr(model, "_loss_function", None), FusedCausalLoss):
            return True
        if self._leaves_logits is None:
            self._leaves_logits = leaves_logits(model)
        return self._leaves_logits

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            logger.info("inlay: %s", line)


def _is_padded(kwargs: dict[str, Any]) -> bool:
    """Whether these are ids, labels and a mask of padding, all ``[B, T]``, and nothing a row could not be made of."""
    ids: Any = kwargs.get("input_ids")
    mask: Any = kwargs.get("attention_mask")
    labels: Any = kwargs.get("labels")
    positions = kwargs.get("position_ids")
    if not all(type(value) is Tensor and value.dim() == 2 for value in (ids, mask, labels)):
        return False
    if not ids.shape == mask.shape == labels.shape:
        return False
    if positions is not None and (type(positions) is not Tensor or positions.shape not in (ids.shape, ids[:1].shape)):
        return False
    others = {name: value for name, value in kwargs.items() if name not in _TAKEN and value is not None}
    return all(value in _HARMLESS.get(name, ()) for name, value in others.items()) and bool((mask == 0).any())


def why_shapes_matter(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Who would see that hidden states have another shape."""
    asked = next((name for name in _OUTPUTS if getattr(getattr(model, "config", None), name, False)), None)
    if asked is not None:
        return f"config.{asked} asks for more than the loss"
    if kwargs.get("return_dict", getattr(getattr(model, "config", None), "return_dict", True)) is False:
        return "return_dict=False: logits have no name to be put back by"
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if not of_a_library(hook) or "neftune" in str(getattr(hook, "__module__", "")):
                return f"a hook on {name or 'the model'} sees hidden states"
    return None


def _put_logits_back(model: nn.Module, row: Row) -> None:
    """After this forward, and once: logits where the tokens stood. The fused loss has left none."""

    def back(_: nn.Module, args: Any, output: Any) -> None:
        handle.remove()
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and not computes_losses_only(model):
            output["logits"] = row.back(logits)

    handle = model.register_forward_hook(back, always_call=True)
