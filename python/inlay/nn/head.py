"""The fused loss: logits that are never kept.

In training mode the output head returns :class:`DeferredLogits`, and the model's loss function computes the
cross-entropy from them in chunks. It engages only when it is the model's loss by construction: anything the model does
to the logits before its loss (a softcap, a scale, a cast) makes them ordinary logits, and the ordinary loss follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.cross_entropy import linear_cross_entropy
from ..sharding import whole
from .mixed import Mixed, mix


class LogitsNotKeptError(AttributeError):
    """Training-mode logits were read after the fused loss; an AttributeError so that ``hasattr`` stays quiet."""


class DeferredLogits:
    """``hidden·Wᵀ + b``, not computed. Any use as a tensor before the loss computes it, once; after it, raises.

    Attributes:
        hidden: ``[..., H]``, the head's input. head: the output head, ``[V, H]``.
        computed: the logits, if something has used them.
    """

    def __init__(self, hidden: Tensor, head: nn.Linear) -> None:
        self.hidden, self.head = hidden, head
        self.computed: Tensor | None = None
        self.consumed = False

    def materialize(self) -> Tensor:
        """The logits themselves, ``[..., V]``.

        Raises:
            LogitsNotKeptError: the fused loss has been computed from them already.
        """
        if self.consumed:
            raise LogitsNotKeptError(
                "outputs.logits is not kept in training mode: inlay computed the loss from hidden states in chunks; "
                "pass fused_loss=False to inlay.tune (or call model.eval()) to get logits"
            )
        if self.computed is None:
            self.computed = nn.functional.linear(self.hidden, whole(self.head.weight), whole(self.head.bias))
        return self.computed

    def contiguous(self) -> DeferredLogits:
        """Itself: the product will be (OPT asks before its loss)."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*_materialized(args), **_materialized(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.materialize(), name)

    def __hash__(self) -> int:
        return id(self)  # as tensors do, since == compares values

    def __repr__(self) -> str:
        state = "consumed by the fused loss" if self.consumed else "not computed yet"
        return f"DeferredLogits({tuple(self.hidden.shape[:-1])} x {self.head.out_features}, {state})"


def _materialized(value: Any) -> Any:
    """``value`` with the logits in it computed; torch functions take them alone, in lists (stack) and by name."""
    if isinstance(value, DeferredLogits):
        return value.materialize()
    if isinstance(value, dict):
        return {key: _materialized(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_materialized(item) for item in value)
    return value


def _operator(name: str):
    def apply(self: DeferredLogits, *args: Any) -> Any:
        return getattr(self.materialize(), name)(*_materialized(args))

    apply.__name__ = name
    return apply


_OPERATORS = "add radd sub rsub mul rmul truediv rtruediv neg abs pow matmul getitem setitem len iter eq ne lt le gt ge"
for _name in _OPERATORS.split():
    setattr(DeferredLogits, f"__{_name}__", _operator(f"__{_name}__"))


class DeferringHead(Mixed):
    """Mixin of an output head: returns :class:`DeferredLogits` where a loss can follow."""

    inlay_loss_only = False  # see losses_only

    def forward(self, hidden: Tensor) -> Tensor | DeferredLogits:
        wanted = self.inlay_loss_only or (self.training and torch.is_grad_enabled())
        if not wanted or torch.compiler.is_compiling():
            # generate() passes the last position of each row, a strided slice, for which torch would copy a frozen head
            # once per row.
            return nn.functional.linear(hidden.contiguous(), self.weight, self.bias)
        return DeferredLogits(hidden, self)


class FusedCausalLoss:
    """transformers' causal-LM loss, computed in chunks where the logits are still deferred.

    Args:
        original: the model's own loss function, used for everything else.
        last: name of the loss that ran last, "fused" or "eager": what ``finetune`` prints.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.last: str | None = None

    def __call__(
        self,
        logits: Tensor | DeferredLogits,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if isinstance(logits, DeferredLogits) and vocab_size in (None, logits.head.out_features):
            self.last = "fused"
            return fused_loss(logits, labels, num_items_in_batch, ignore_index, shift_labels)
        self.last = "eager"
        if isinstance(logits, DeferredLogits):
            logits = logits.materialize()
        return self.original(
            logits=logits,
            labels=labels,
            vocab_size=vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            **kwargs,
        )


def fused_loss(
    logits: DeferredLogits,
    labels: Tensor | None,
    num_items: Tensor | int | None,
    ignore_index: int,
    shift_labels: Tensor | None,
) -> Tensor:
    """Cross-entropy of ``labels [B, T]`` shifted by one (or ``shift_labels``), fp32 scalar; consumes ``logits``."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, head = logits.hidden, logits.head
    loss = linear_cross_entropy(
        hidden,
        whole(head.weight),  # sharded again by now if FSDP2 has the head as a unit of its own
        shift_labels.to(hidden.device),
        num_items=num_items,
        ignore_index=ignore_index,
        bias=whole(head.bias),
    )
    logits.consumed, logits.computed = True, None
    return loss


def install_head(model: nn.Module) -> bool:
    """Make a causal LM's head defer its logits. True if it did: a plain linear head and transformers' causal loss."""
    from ..integrations.transformers import causal_lm_loss

    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    original = causal_lm_loss(model)
    if isinstance(head, DeferringHead):
        return True
    if type(head) is not nn.Linear or original is None:
        return False
    mix(head, DeferringHead)
    model.loss_function = FusedCausalLoss(original)
    return True


@contextmanager
def losses_only(model: nn.Module) -> Iterator[None]:
    """Within this context the fused loss also serves evaluation, where nobody reads the logits."""
    heads = [module for module in model.modules() if isinstance(module, DeferringHead)]
    for head in heads:
        head.inlay_loss_only = True
    try:
        yield
    finally:
        for head in heads:
            head.inlay_loss_only = False


def computes_losses_only(model: nn.Module) -> bool:
    """Whether ``model`` is called within :func:`losses_only`."""
    get = getattr(model, "get_output_embeddings", None)
    return bool(getattr(get() if callable(get) else None, "inlay_loss_only", False))


def remove_head(model: nn.Module) -> None:
    """Undo what :func:`install_head` did to the loss; the mixin goes with the others."""
    if isinstance(getattr(model, "_loss_function", None), FusedCausalLoss):
        del model._loss_function
