"""Keep the backward from running where nobody wants a gradient.

Without gradient checkpointing autograd does this alone: nothing below the first trainable requires a gradient. With it,
transformers makes the embeddings' output require one (``enable_input_require_grads``), and the whole model is recorded.
A mixin on the blocks looks at what enters each of them, at each call: a tensor whose gradient would end at such an
artificial leaf alone is detached, and the blocks up to the first trained one record nothing. Since the graph itself is
asked, this holds whatever the order of the blocks is and however often each one runs.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..integrations.transformers import checkpoints_reentrantly
from ..sites import block_stacks
from ..task_head import task_head
from .mixed import Mixed, mix, unmix
from .wanted import forget_embeddings, is_wanted, watch_embeddings

_HEADS: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """How names of parameters of the task's head begin, where all other weights stand before it, as it reads them."""
    if model not in _HEADS:
        head = task_head(model)
        children = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
        rest = [place for place, name in enumerate(children) if name not in head]
        after = children[rest[-1] + 1 :] if rest else []
        _HEADS[model] = tuple(f"{name}." for name in head if name in after)
    return _HEADS[model]


def first_trained_block(model: nn.Module) -> nn.Module | None:
    """The first block that holds a trainable, if everything trained before the head is in one stack; else None."""
    after = head_prefixes(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith(after)]
    for name, stack in block_stacks(model).items():
        inside = [n for n in trained if n.startswith(f"{name}.")]
        if not inside:
            continue
        if len(inside) != len(trained):  # something outside trains too, perhaps below: leave autograd alone
            return None
        return stack[min(int(n[len(name) + 1 :].split(".")[0]) for n in inside)]
    return None


class StopsBackprop(Mixed):
    """Mixin of the blocks. Overrides ``__call__``, not ``forward``: transformers checkpoints a block in its
    ``__call__``, and the input must be detached before the checkpoint sees it."""

    inlay_model: tuple[nn.Module, ...]  # a tuple, so that it is not a submodule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        args = tuple(_without_artificial(value) for value in args)
        kwargs = {name: _without_artificial(value) for name, value in kwargs.items()}
        if not checkpoints_reentrantly(self) or any(_requires_grad(value) for value in args):
            return super().__call__(*args, **kwargs)
        # A reentrant checkpoint of inputs none of which requires a gradient records nothing.
        if any(parameter.requires_grad for parameter in self.parameters()):
            return super().__call__(*_one_requiring_grad(args), **kwargs)
        self.gradient_checkpointing = False  # nothing to keep here, but for what hooks of the user's may add
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.gradient_checkpointing = True


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _without_artificial(value: Any) -> Any:
    """``value``, detached if it is a tensor whose gradient nobody wants."""
    return value.detach() if _requires_grad(value) and not is_wanted(value) else value


def _one_requiring_grad(args: tuple) -> tuple:
    """``args`` in which the first floating-point tensor requires a gradient.

    Raises:
        RuntimeError: there is none, so that the parameters under the checkpoint would silently not train.
    """
    for place, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:place], value.detach().requires_grad_(True), *args[place + 1 :])
    raise RuntimeError(
        "reentrant checkpointing wants the hidden states as a positional argument of the block, got none: its trained "
        'weights would get no gradient; pass gradient_checkpointing_kwargs={"use_reentrant": False}'
    )


def install_partial_backprop(model: nn.Module) -> None:
    """Put the mixin on the blocks of ``model`` that lack it."""
    watch_embeddings(model)
    for stack in block_stacks(model).values():
        for block in stack:
            if isinstance(block, Mixed) or next(block.children(), None) is None:
                continue  # a layer of its own, which is no block
            mix(block, StopsBackprop)
            block.inlay_model = (model,)


def remove_partial_backprop(model: nn.Module) -> None:
    """Undo :func:`install_partial_backprop`."""
    forget_embeddings(model)
    for module in model.modules():
        if isinstance(module, StopsBackprop):
            unmix(module)


def stops_backprop(block: nn.Module) -> bool:
    """True if ``block`` is the first that is recorded, all that trains before the head being in its stack."""
    if not isinstance(block, StopsBackprop):
        return False
    first = first_trained_block(block.inlay_model[0])
    return first is not None and any(module is block for module in first.modules())  # or what wraps it
