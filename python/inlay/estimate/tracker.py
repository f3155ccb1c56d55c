"""What one training step allocates and computes, found by running the step on tensors without data.

Tensors on the meta device have shapes, dtypes and storages, but no memory; autograd, module code and our ops run on
them as on real ones. A dispatch mode sees every op: it follows each storage from birth to death, and counts the
floating-point operations of every matrix product. No formula knows a model family or a method.

What depends on values has no answer there. Every predicate is taken as true (no padding, every token supervised,
everything finite), every number as zero.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..nn.tuned_linear import TunedLinear
from .flops import FORMULAS, HIDDEN_WORKSPACE, part_of
from .report import GRADIENTS, LOSS, WORKING

#: Kinds of kept tensors by the class name of the innermost module that keeps them.
_KINDS = (
    (re.compile(r"norm", re.IGNORECASE), "norms"),
    (re.compile(r"attention|attn", re.IGNORECASE), "attention"),
    (re.compile(r"mlp|feedforward|dense|intermediate|output|expert", re.IGNORECASE), "mlp"),
)
_aten = torch.ops.aten


class _Held:
    """A storage that is alive."""

    def __init__(self, size: int, kind: str) -> None:
        self.size, self.kind, self.kept = size, kind, False


class Tracker(TorchDispatchMode):
    """Bytes alive by kind, their highest sum, and FLOPs by part.

    Attributes:
        at_peak: bytes by kind when their sum was highest. kept: bytes by kind kept for backward when it began.
        flops: floating-point operations by part, a multiply and an add counting as two.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.peak = 0
        self._alive: Counter[str] = Counter()
        self._total = 0
        self._held: dict[int, _Held] = {}
        self._watches: dict[int, weakref.ref] = {}
        self._modules: list[nn.Module] = []
        self._kinds: list[str] = []
        self._backward = self._in_loss = False
        self._head = _output_head(model)
        self._before = {_key(t) for t in (*model.parameters(), *model.buffers())}
        self._roles = _roles(model, self._head)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._found_gradient)

    # --- running ------------------------------------------------------------------------------------------------------

    def step(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        """One forward and backward of ``model(**batch).loss``."""
        with ExitStack() as stack:
            for hook in (
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ):
                stack.callback(hook.remove)
            stack.enter_context(self)
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                loss = model(**batch).loss
            self._in_loss, self._backward = False, True
            for held in self._held.values():
                if held.kept:
                    self.kept[held.kind] += held.size
            loss.backward()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._modules.append(module)
        self._kinds.append(_kind_of(module, self._kinds[-1] if self._kinds else "other"))
        if module is self._head and not self._backward:
            self._in_loss = True  # logits, or what stands for them, and all that follows

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._modules and self._modules[-1] is module:
            self._modules.pop()
            self._kinds.pop()

    @property
    def _kind(self) -> str:
        return LOSS if self._in_loss else self._kinds[-1] if self._kinds else "other"

    @property
    def _stage(self) -> str:
        """Modules run during the backward only where gradient checkpointing runs them again."""
        if not self._backward:
            return "forward"
        return "recomputed" if self._modules else "backward"

    # --- storages -----------------------------------------------------------------------------------------------------

    def _hold(self, tensor: Tensor) -> None:
        if tensor.device.type != "meta":
            return
        key = _key(tensor)
        if key in self._held or key in self._before:
            return
        storage = tensor.untyped_storage()
        held = self._held[key] = _Held(storage.nbytes(), LOSS if self._in_loss else WORKING)
        self._watches[key] = weakref.ref(storage, lambda _: self._release(key))
        self._add(held.kind, held.size)

    def _release(self, key: int) -> None:
        held = self._held.pop(key, None)
        self._watches.pop(key, None)
        self._roles.pop(key, None)
        if held is not None:
            self._add(held.kind, -held.size)

    def _add(self, kind: str, size: int) -> None:
        self._alive[kind] += size
        self._total += size
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, self._alive.copy()

    def _relabel(self, tensor: Tensor, kind: str) -> None:
        held = self._held.get(_key(tensor))
        if held is not None and held.kind != kind:
            self._alive[held.kind] -= held.size
            self._alive[kind] += held.size
            held.kind = kind

    def _keep(self, tensor: Tensor) -> Tensor:
        held = self._held.get(_key(tensor))
        if held is not None and not held.kept:
            held.kept = True
            self._relabel(tensor, self._kind)
        return tensor

    def _found_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._relabel(parameter.grad, GRADIENTS)

    # --- ops ----------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        answer = _without_values(func, args)
        out = func(*args, **kwargs) if answer is None else answer
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in outputs:
            self._hold(tensor)
        packet = getattr(func, "overloadpacket", None)
        hidden = HIDDEN_WORKSPACE.get(packet)
        if hidden is not None:
            size = hidden(*args)
            self._add(WORKING, size)
            self._add(WORKING, -size)
        formula = FORMULAS.get(packet)
        if formula is None:
            self._pass_on_role(func, inputs, outputs)
            return out
        roles = {self._role(t) for t in inputs}
        part = part_of(packet, roles, self._stage, self._in_loss)
        self.flops[part] += int(formula(*args, **kwargs, out_val=out))
        return out

    def _pass_on_role(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """A weight's cast, transpose or dequantized panel is still that weight; so are weights of one role, joined."""
        if func._schema.name.startswith("inlay::dequantize"):
            packed = inputs[0] if not func._schema.is_mutable else inputs[1]
            outputs, inputs, same_size = outputs or inputs[:1], [packed], False
        else:
            same_size = True
        joined = sum(source.numel() for source in inputs) if len({self._role(t) for t in inputs}) == 1 else None
        for source in inputs:
            role = self._role(source)
            if role is None:
                continue
            for tensor in outputs:
                if not same_size or tensor.numel() in (source.numel(), joined):
                    self._roles.setdefault(_key(tensor), role)

    def _role(self, tensor: Tensor) -> str | None:
        return self._roles.get(_key(tensor))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _kind_of(module: nn.Module, outer: str) -> str:
    if isinstance(module, TunedLinear):
        return "delta inputs"
    name = type(module).__name__
    return next((kind for pattern, kind in _KINDS if pattern.search(name)), outer)


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _roles(model: nn.Module, head: nn.Module | None) -> dict[int, str]:
    """What each parameter is to a matrix product: the output head, a delta, or a base weight."""
    roles = {}
    for parameter in model.parameters():
        roles[_key(parameter)] = "delta" if parameter.requires_grad else "base"
    if head is not None:
        for parameter in head.parameters(recurse=False):
            roles[_key(parameter)] = "head"
    return roles


def _without_values(func: Any, args: tuple) -> Any:
    """An answer for the ops that ask what a tensor holds; None for all others."""
    if func is _aten.nonzero.default:
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
    if func is _aten._local_scalar_dense.default:
        if args[0].device.type != "meta":
            return None
        return True if args[0].dtype == torch.bool else 0 if not args[0].is_floating_point() else 0.0
    if func is _aten.equal.default:
        return True
    return None
