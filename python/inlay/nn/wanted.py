"""Which gradients somebody wants: those that reach a parameter that trains, or a tensor of the caller's.

Under gradient checkpointing transformers makes the embeddings' output require a gradient, whoever wants it
(``enable_input_require_grads``), so that the blocks above are recorded. That tensor is known by these signs: it is a
leaf, it is what an input embedding returned, within a forward that still runs, and nothing but libraries' hooks has
seen it there. Every other leaf is somebody's: a parameter, or a tensor that was passed in as ``inputs_embeds``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

#: Packages whose forward hooks may stand on an embedding without wanting its gradient.
_LIBRARIES = ("inlay", "transformers", "peft", "trl", "accelerate", "torch")
#: What a node of the graph is told by that the gradient is wanted there, in its metadata.
_KNOWN = "inlay_wanted"


class _Running(threading.local):
    """Calls, of modules that hold an embedding, that run in this thread, outermost first."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, FrameType]] = []  # the module's id, the frame that called its hooks
        self.token = object()  # of the outermost call

    def prune(self) -> None:
        """Forget calls that an interrupt has ended: they are on the stack no longer."""
        alive, frame = set(), sys._getframe(1)
        while frame is not None:
            alive.add(frame)
            frame = frame.f_back  # type: ignore[assignment]
        self.calls = [call for call in self.calls if call[1] in alive]


_running = _Running()


def _enter(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of what holds an embedding."""
    if torch.compiler.is_compiling():
        return
    _running.prune()
    if not _running.calls:
        _running.token = object()
    _running.calls.append((id(module), sys._getframe(1)))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of what holds an embedding, also where it raised."""
    if torch.compiler.is_compiling():
        return
    for place in reversed(range(len(_running.calls))):
        if _running.calls[place][0] == id(module):
            del _running.calls[place:]
            break


def _mark(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of an embedding: a gradient that its output, a leaf, comes to require is artificial."""
    if torch.compiler.is_compiling() or not isinstance(output, Tensor) or not output.is_leaf:
        return
    _running.prune()
    if _running.calls and all(of_a_library(hook) for hook in module._forward_hooks.values()):
        output.inlay_artificial = _running.token


def of_a_library(hook: Any) -> bool:
    """Whether a hook was put on a module by a library rather than by the user."""
    hook = getattr(hook, "func", hook)
    return str(getattr(hook, "__module__", "")).split(".")[0] in _LIBRARIES


def watch_embeddings(model: nn.Module) -> None:
    """Hook the input embeddings of ``model``, which :func:`is_wanted` tells from other tensors, and what holds them."""
    forget_embeddings(model)
    embeddings = _input_embeddings(model)
    names = [name for name, module in model.named_modules() if name and any(module is e for e in embeddings)]
    for name in names:
        model.get_submodule(name).register_forward_hook(_mark)
    for holder in {holder for name in names for holder in _holders(name)}:
        module = model.get_submodule(holder)
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)


def forget_embeddings(model: nn.Module) -> None:
    """Undo :func:`watch_embeddings`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_enter, _leave, _mark)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _holders(name: str) -> list[str]:
    """Names of the modules that the module ``name`` is in, the model's own, ``""``, included."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """What transformers would make require a gradient."""
    found = []
    for module in model.modules():
        get = getattr(module, "get_input_embeddings", None)
        try:
            embeddings = get() if callable(get) else None
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(embeddings, nn.Module):
            found.append(embeddings)
    return found


def is_wanted(tensor: Tensor) -> bool:
    """True unless the gradient of ``tensor``, which requires one, ends at artificial leaves alone."""
    if tensor.grad_fn is None:
        return not _is_artificial(tensor)
    found = _reaches_a_leaf([tensor.grad_fn])
    if found:
        tensor.grad_fn.metadata[_KNOWN] = True  # the next block's search ends here
    return found


def _reaches_a_leaf(nodes: list[Any]) -> bool:
    """Whether a leaf that is not artificial, or a node that may hide one, is among ``nodes`` or below them."""
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if node.metadata.get(_KNOWN) or _may_hide(node) or (leaf is not None and not _is_artificial(leaf)):
            return True
        nodes.extend(_below(node.next_functions))
    return False


def _below(functions: Iterable[tuple[Any, int]]) -> Iterator[Any]:
    return (node for node, _ in functions if node is not None)


def _is_artificial(leaf: Tensor) -> bool:
    return getattr(leaf, "inlay_artificial", None) is _running.token


def _may_hide(node: Any) -> bool:
    """True for a Function that may have run modules whose parameters it does not show, as reentrant checkpoints do."""
    if not isinstance(node, BackwardCFunction):
        return False
    module = node._forward_cls.__module__
    return module.split(".")[0] not in ("inlay", "torch") or module == "torch.utils.checkpoint"
