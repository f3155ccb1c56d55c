"""Change what a module computes without replacing it: a subclass of its own class with a mixin in front.

The module keeps its identity, parameters, hooks, state-dict keys and ``isinstance`` relations (transformers records
attentions and hidden states by class), and :func:`unmix` undoes it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Mixed:
    """Base of mixins for :func:`mix`."""

    _inlay_plain_class: type

    def __reduce_ex__(self, protocol: int):
        """Pickle by mixin and plain class, since the mixed class exists only at run time."""
        return _rebuild, (self._inlay_mixin, self._inlay_plain_class), dict(self.__dict__)

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        # torch's own __setstate__ also fills in what modules saved by older releases lack
        self._inlay_plain_class.__setstate__(self, attributes)


@cache
def mixed_class(mixin: type, plain: type) -> type:
    """``plain`` with ``mixin`` in front, under the plain class's name, which transformers and users read."""
    attributes = {
        "_inlay_plain_class": plain,
        "_inlay_mixin": mixin,
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
    }
    return type(plain.__name__, (mixin, plain), attributes)


def mix(module: nn.Module, mixin: type) -> nn.Module:
    """Put ``mixin`` in front of ``module``'s class, in place."""
    module.__class__ = mixed_class(mixin, type(module))
    return module


def unmix(module: nn.Module) -> nn.Module:
    """Undo :func:`mix`; does nothing to a module that was not mixed."""
    if isinstance(module, Mixed):
        module.__class__ = module._inlay_plain_class
        for attribute in [a for a in module.__dict__ if a.startswith("inlay_")]:
            delattr(module, attribute)
    return module


def _rebuild(mixin: type, plain: type) -> nn.Module:
    return (cls := mixed_class(mixin, plain)).__new__(cls)
