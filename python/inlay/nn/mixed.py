"""Change what a module computes without replacing it: a subclass of its own class with a mixin in front.

The module keeps its identity, parameters, hooks, state-dict keys and ``isinstance`` relations (transformers records
attentions and hidden states by class), and :func:`unmix` undoes it.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

from torch import nn

# To a type checker a mixin is the module it will be mixed into.
if TYPE_CHECKING:
    from torch.nn import Module as _Module
else:
    _Module = object


class Mixed(_Module):
    """Base of mixins for :func:`mix`."""

    _inlay_plain_class: Any
    _inlay_mixin: type

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle by mixin and plain class, since the mixed class exists only at run time."""
        mixins, plain = chain_of(type(self))
        return _rebuild, (mixins, plain), dict(self.__dict__)

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        # torch's own __setstate__ also fills in what modules saved by older releases lack
        plain: Any = chain_of(type(self))[1]
        plain.__setstate__(self, attributes)


@cache
def mixed_class(mixin: Any, plain: Any) -> Any:
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
    module.__class__ = mixed_class(mixin, cast(Hashable, type(module)))
    return module


def unmix(module: nn.Module) -> nn.Module:
    """Undo the last :func:`mix`; does nothing to a module that was not mixed."""
    if isinstance(module, Mixed):
        declared = _declared(module._inlay_mixin)
        module.__class__ = module._inlay_plain_class
        for attribute in declared - _declared(type(module)):
            module.__dict__.pop(attribute, None)
    return module


def _declared(cls: type) -> set[str]:
    """What the mixins in a class say they keep in their modules."""
    return {
        name for base in cls.__mro__ for name in base.__dict__.get("__annotations__", ()) if name.startswith("inlay_")
    }


def chain_of(mixed: Any) -> tuple[tuple[type, ...], type]:
    """The mixins in front of a class, the last one first, and the plain class behind them."""
    mixins = []
    while issubclass(mixed, Mixed):
        mixins.append(mixed._inlay_mixin)
        mixed = mixed._inlay_plain_class
    return tuple(mixins), mixed


def _rebuild(mixins: tuple[type, ...], plain: type) -> nn.Module:
    mixed: Any = plain
    for mixin in reversed(mixins):
        mixed = mixed_class(mixin, mixed)
    return mixed.__new__(mixed)
