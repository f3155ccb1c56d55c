"""TunedLinear: one frozen base and the named deltas on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..bases.linear import base_linear, base_of, is_conv1d
from ..deltas import Delta
from ..ops.swiglu import swiglu

#: Where torch keeps the hooks of a module.
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def is_watched(module: nn.Module) -> bool:
    """True if hooks, or a ``forward`` put in place of its class's, rely on calls of ``module``."""
    return any(getattr(module, hooks) for hooks in HOOKS) or "forward" in module.__dict__


class TunedLinear(nn.Linear):
    """A linear with a frozen base weight and trainable deltas; an ``nn.Linear``, so that "all-linear" finds it.

    On a dense base ``weight`` and ``bias`` are the original frozen Parameters under their original keys, in their
    original layout (``[in, out]`` where the wrapped module was a Conv1D). Deltas live under ``deltas.<adapter>``.

    Args:
        module: the ``nn.Linear`` or transformers ``Conv1D`` to wrap. It is not changed, and comes back on merge.
    """

    inlay_linear = True  # see bases.linear.computes_linear

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: the weights exist already
        weight = module.weight
        self.base: Any = base_of(module)
        out_features, in_features = weight.shape[::-1] if is_conv1d(module) else weight.shape
        self.in_features, self.out_features = int(in_features), int(out_features)
        if is_conv1d(module):
            self.nf, self.nx = module.nf, module.nx
        self.weight = weight
        self.register_parameter("bias", module.bias)
        self.start(module)

    def start(self, module: nn.Module) -> None:
        """Begin without deltas; ``module`` is what :meth:`to_plain` brings back."""
        self.deltas = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.plain_holder = (module,)  # a tuple, so that it is not a submodule and adds no state-dict keys
        self.training = module.training
        for hooks in HOOKS:  # the same dicts, so that a hook stays whichever of the two it was put on
            setattr(self, hooks, getattr(module, hooks))
        self._is_full_backward_hook = module._is_full_backward_hook

    @property
    def base_tensors(self) -> tuple[Tensor | None, ...]:
        """What the base's products take."""
        return self.weight, self.bias

    @property
    def weight_view(self) -> Tensor:
        """The dense base weight as ``[out, in]``, a view."""
        weight = self.weight.detach()
        return weight.t() if is_conv1d(self.plain_holder[0]) else weight

    def add_delta(self, name: str, delta: Delta) -> None:
        """Add ``delta`` as adapter ``name``; raises as :meth:`check_room` does."""
        self.check_room(name, delta)
        self.deltas[name] = delta

    def check_room(self, name: str, delta: Delta) -> None:
        """Raise ValueError if ``name`` is taken, or a second delta would share the base with one that owns it."""
        if name in self.deltas:
            raise ValueError(f"adapter {name!r} exists already on this linear; choose another adapter_name")
        if self.deltas and (delta.owns_base or any(d.owns_base for d in self.deltas.values())):
            raise ValueError(
                'wanted one adapter on a base tuned with update="in_place" or keep="exact", got a second; '
                "use the additive forms where several adapters share a base"
            )

    def remove_delta(self, name: str) -> None:
        """Forget adapter ``name``; the base is as it was without it."""
        del self.deltas[name]

    def swap_delta(self, name: str, other: Delta) -> None:
        """Give adapter ``name`` the tensors of ``other``, in its own memory."""
        self.restore_base()
        self.deltas[name].take(other)
        self.sync()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """What :meth:`to_plain` brings back moves along."""
        super()._apply(fn, recurse)
        plain = self.plain_holder[0]
        plain._parameters.update({name: self._parameters[name] for name in plain._parameters.keys() & self._parameters})
        return self

    def forward(self, x: Tensor) -> Tensor:
        active = self.active_deltas()
        if len(active) == 1:
            return active[0].linear(x, self.base, *self.base_tensors)
        if not active:
            self.restore_base()
        y = base_linear(x, self.base, *self.base_tensors)
        for delta in self.deltas.values():
            if delta not in active:
                y = delta.add_original(y, x)
        for delta in active:
            y = delta.add_to(y, x)
        return y

    def forward_gated(self, gate: Tensor, up: Tensor, act: str) -> Tensor:
        """``self(act(gate) * up)`` for a down projection: a delta that can rebuild its input saves none of it."""
        active = self.active_deltas()
        if len(active) == 1:
            return active[0].gated_linear(gate, up, act, self.base, *self.base_tensors)
        return self(swiglu(gate, up, act))

    @property
    def watched(self) -> bool:
        """True if hooks, or a ``forward`` put in place of ours, rely on calls of this module."""
        return is_watched(self)

    def active_deltas(self) -> list[Delta]:
        """The deltas a forward applies, in the order they were activated."""
        return [self.deltas[name] for name in self.active if name in self.deltas]

    def restore_base(self) -> None:
        """Give the base weight its original values where an in-place delta had written its own."""
        for delta in self.deltas.values():
            if delta.in_place:
                delta.restore(self.weight_view)

    def sync(self) -> None:
        """Make ``weight`` what a forward would use now (only in-place deltas change it)."""
        active = self.active_deltas()
        in_place = [d for d in active if d.in_place]
        if in_place:
            in_place[0].write(self.weight_view)
        else:
            self.restore_base()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Base plus the active deltas, in the dtype and layout of ``weight``."""
        self.restore_base()
        merged = self.weight_view
        for delta in self.active_deltas():
            merged = delta.merge_into(merged)
        if is_conv1d(self.plain_holder[0]):
            merged = merged.t()
        return merged.contiguous()

    def to_plain(self) -> nn.Module:
        """The module this one wrapped, holding the merged weight."""
        plain = self.plain_holder[0]
        plain.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        plain.bias = self.bias  # the one that moved with the model
        plain.train(self.training)
        return plain

    def extra_repr(self) -> str:
        layout = "Conv1D" if is_conv1d(self.plain_holder[0]) else "Linear"
        return f"{layout}, in={self.in_features}, out={self.out_features}, active={list(self.active)}"
