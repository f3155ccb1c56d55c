"""TunedLinear: one frozen base and the named pieces on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..bases.linear import base_linear, base_of, is_conv1d
from ..ops.swiglu import swiglu
from .holder import Holder, inputs_of

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
    """True if something relies on calls of ``module``: hooks, a ``forward`` put in place of its class's, or a tensor
    in it that trains whole, which the call casts."""
    names = module.__dict__
    return any(getattr(module, hooks) for hooks in HOOKS) or "forward" in names or "inlay_whole" in names


class TunedLinear(Holder, nn.Linear):
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
        """Begin without pieces; ``module`` is what :meth:`to_plain` brings back."""
        self.start_holding()
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
        changed, inputs = inputs_of(active, x)
        y = base_linear(changed, self.base, *self.base_tensors)
        for delta in self.pieces().values():
            if delta not in active:
                y = delta.add_original(y, changed)
        for delta, given in zip(active, inputs, strict=True):
            y = delta.after(y, given)
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

    def restore_base(self) -> None:
        """Give the base weight its original values where an in-place delta had written its own."""
        for delta in self.pieces().values():
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
    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Base plus the active pieces: weight and bias in their dtypes, the weight in the layout of ``weight``."""
        self.restore_base()
        weight, bias = self.weight_view, self.bias
        for delta in self.active_deltas():
            weight, bias = delta.merge(weight, bias)
        if is_conv1d(self.plain_holder[0]):
            weight = weight.t()
        return weight.contiguous(), bias

    def unwrapped(self) -> nn.Module:
        """The module this one wrapped, with the weight and bias that stand here, nothing merged."""
        plain = self.plain_holder[0]
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)

    def to_plain(self) -> nn.Module:
        """The module this one wrapped, holding the merged weight and bias."""
        plain = self.plain_holder[0]
        weight, bias = self.merged()
        plain.weight = nn.Parameter(weight, requires_grad=False)
        kept = bias is None or isinstance(bias, nn.Parameter)
        plain.bias = bias if kept else nn.Parameter(bias, requires_grad=False)
        plain.train(self.training)
        return plain

    def extra_repr(self) -> str:
        layout = "Conv1D" if is_conv1d(self.plain_holder[0]) else "Linear"
        return f"{layout}, in={self.in_features}, out={self.out_features}, active={list(self.active)}"
