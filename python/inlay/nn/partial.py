"""Keep the backward from running below the earliest trained block.

Without gradient checkpointing autograd does this alone: nothing below the first trainable requires a gradient. With it,
transformers makes the embeddings' output require one (``enable_input_require_grads``), and the whole model is recorded.
A mixin on the first trained block detaches its input there. The other blocks of the stack have it too, without effect:
accelerate shards what is an instance of the first block's class.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..integrations.transformers import checkpoints_reentrantly
from ..task_head import task_head
from .mixed import Mixed, mix, unmix


def block_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost ``nn.ModuleList``s by name: the stacks of blocks of a transformer."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in stacks):
            stacks[name] = module
    return stacks


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

    inlay_model: tuple[nn.Module, ...]  # of the first trained block; a tuple, so that it is not a submodule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.inlay_model:
            return super().__call__(*args, **kwargs)
        hidden = args[0] if args else kwargs.get("hidden_states")
        reentrant = checkpoints_reentrantly(self)
        if isinstance(hidden, Tensor) and (hidden.requires_grad or reentrant) and torch.is_grad_enabled():
            if self.is_first_trained():
                hidden = hidden.detach().requires_grad_(reentrant)
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        return super().__call__(*args, **kwargs)

    def is_first_trained(self) -> bool:
        """Looked up each time: an adapter switched or a parameter unfrozen behind our back must get its gradient."""
        if torch.compiler.is_compiling():
            return True
        block = first_trained_block(self.inlay_model[0])
        return block is not None and any(module is self for module in block.modules())  # or what wraps it


def install_partial_backprop(model: nn.Module) -> None:
    """(Re)place the mixin on the blocks of ``model``, so that backpropagation stops at the first trained one."""
    for module in model.modules():
        if isinstance(module, StopsBackprop):
            unmix(module)
    block = first_trained_block(model)
    for stack in block_stacks(model).values() if block is not None else ():
        if not any(other is block for other in stack):
            continue
        for other in stack:
            mix(other, StopsBackprop)
            other.inlay_model = (model,) if other is block else ()


def stops_backprop(block: nn.Module) -> bool:
    """True if backpropagation ends at the input of ``block``."""
    return isinstance(block, StopsBackprop) and bool(block.inlay_model)
