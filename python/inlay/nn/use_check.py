"""Proof that tuned linears are called: a delta on one whose weight somebody else reads would do nothing.

Some modules take a child's ``.weight`` and multiply themselves (``nn.MultiheadAttention``, WavLM's attention, Gemma
3n's coefficients, fused Mamba kernels). Which ones do depends on the mode and the device, so it is seen rather than
listed: during one forward every chosen linear notes whether it was called and whether its weight was read from outside.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .modes import evaluating

#: Models of more bytes than this are not run at ``tune``; their first training forward is looked at all the same.
PROBE_UP_TO = 8 << 30
_USE, _UNSEEN = "inlay_use", "inlay_use_unseen"


class Use:
    """What one forward did with a linear."""

    def __init__(self) -> None:
        self.called = self.read = False
        self.inside = 0

    @contextmanager
    def call(self) -> Iterator[None]:
        self.called, self.inside = True, self.inside + 1
        try:
            yield
        finally:
            self.inside -= 1


@contextmanager
def observed(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Use]]:
    """Within this context each of ``modules`` notes its use; classes are put back after it."""
    uses = {name: Use() for name in modules}
    before = {name: (type(module), module.__dict__.get(_USE)) for name, module in modules.items()}
    for name, module in modules.items():
        module.__dict__[_USE] = uses[name]
        module.__class__ = _observing(cast(Hashable, before[name][0]))
    try:
        yield uses
    finally:
        for name, module in modules.items():
            module.__class__, outer = before[name]
            if outer is None:
                del module.__dict__[_USE]
            else:  # somebody else is looking too
                module.__dict__[_USE] = outer
                outer.called, outer.read = outer.called or uses[name].called, outer.read or uses[name].read


@cache
def _observing(plain: Any) -> Any:
    """``plain`` that notes its calls and reads of ``weight``. Fused blocks call a tuned linear by ``base_tensors``."""

    def entered(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.__dict__[_USE].call():
                return getattr(plain, name)(self, *args, **kwargs)

        return method

    def weight(self: Any) -> Any:
        use = self.__dict__[_USE]
        use.read = use.read or not use.inside
        held = getattr(plain, "weight", None)
        return held.__get__(self) if isinstance(held, property) else self._parameters["weight"]

    def base_tensors(self: Any) -> Any:
        with self.__dict__[_USE].call():
            return plain.base_tensors.fget(self)

    made: dict[str, Any] = {"weight": property(weight), "__module__": plain.__module__}
    made |= {name: entered(name) for name in ("forward", "forward_gated") if hasattr(plain, name)}
    if isinstance(getattr(plain, "base_tensors", None), property):
        made["base_tensors"] = property(base_tensors)
    return type(plain.__name__, (plain,), made)


def refuse_unused(model: nn.Module, uses: Mapping[str, Use]) -> None:
    """Raise ValueError naming a linear whose weight was read and which was not called.

    One that was neither read nor called is no error: an expert to which no token went, a tower without input.
    """
    for name, use in uses.items():
        if use.read and not use.called:
            parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise ValueError(
                f"{name}: its {parent} reads its weight without calling it, so that a delta there has no effect; add "
                "it to exclude_modules"
            )


def check_by_probe(model: nn.Module, names: Iterable[str]) -> bool:
    """Run ``model`` on a tiny input of its own and look at the linears ``names``; False where it cannot be run.

    Weights, buffers, modes and random numbers stay as they are.

    Raises:
        ValueError: see :func:`refuse_unused`.
    """
    if not _can_run(model):
        return False
    chosen = {name: model.get_submodule(name) for name in names}
    try:
        # in eval mode, so that statistics of norms stay as they are
        with evaluating(model), observed(chosen) as uses, torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(**_tiny_inputs(model))
    except Exception:
        return False  # an input of another kind is wanted: the first training forward will tell
    refuse_unused(model, uses)
    return True


def _can_run(model: nn.Module) -> bool:
    """True where the weights are here, whole, and few enough to read once, and the model has an input to show."""
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    plain = all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta for tensor in tensors)
    return plain and 0 < size <= PROBE_UP_TO and hasattr(type(model), "dummy_inputs")


def _tiny_inputs(model: Any) -> dict[str, Tensor]:
    """transformers' own dummy input, or that of the model's class."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in model.dummy_inputs.items() if isinstance(value, Tensor)}


def check_at_first_training_forward(model: nn.Module, linears: Any) -> RemovableHandle:
    """Look at the first forward in training mode, on the device and through the kernels that train.

    Args:
        linears: called with ``model`` for the modules to look at, by name.

    Raises:
        ValueError: see :func:`refuse_unused`; by that forward.
    """
    model.__dict__[_UNSEEN] = True  # by model, so that a copy is looked at in its own right
    return model.register_forward_pre_hook(partial(_look, linears), with_kwargs=True)


def _look(linears: Any, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: look at this forward if it is the first that trains. A function, so that models pickle."""
    if not model.training or torch.compiler.is_compiling() or not model.__dict__.pop(_UNSEEN, False):
        return
    context = observed(linears(model))
    uses = context.__enter__()

    def end(*_: Any) -> None:
        done.remove()
        context.__exit__(None, None, None)
        refuse_unused(model, uses)

    done = model.register_forward_hook(end, always_call=True)
