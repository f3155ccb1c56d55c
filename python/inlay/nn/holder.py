"""What holds pieces: a module of the model, its base frozen, with one piece per adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..pieces import Piece

# To a type checker a holder is the module it will be mixed into.
if TYPE_CHECKING:
    from torch.nn import Module as _Module
else:
    _Module = object


def inputs_of(active: Sequence[Any], x: Any) -> tuple[Any, list[Any]]:
    """What the base gets where the pieces ``active`` change ``x``, and what each of them stands around.

    Pieces are nested, the first one innermost, as merging them one after the other has it.
    """
    inputs = []
    for piece in reversed(active):
        inputs.append(x)
        x = piece.before(x)
    return x, inputs[::-1]


class Holder(_Module):
    """Named pieces, of which some are active. They live under ``deltas.<adapter>``."""

    deltas: nn.ModuleDict
    active: tuple[str, ...]

    def start_holding(self) -> None:
        """Begin without pieces."""
        self.deltas = nn.ModuleDict()
        self.active = ()

    def pieces(self) -> dict[str, Any]:
        """The pieces by adapter."""
        return dict(self.deltas.items())

    def check_room(self, name: str, piece: Piece) -> None:
        """Raise ValueError if ``name`` is taken, or a second piece would share the base with one that owns it."""
        if name in self.deltas:
            raise ValueError(f"adapter {name!r} exists already on this module; choose another adapter_name")
        if self.deltas and (piece.owns_base or any(held.owns_base for held in self.pieces().values())):
            raise ValueError(
                'wanted one adapter on a base tuned with update="in_place" or keep="exact", got a second; '
                "use the additive forms where several adapters share a base"
            )

    def add_delta(self, name: str, piece: Piece) -> None:
        """Add ``piece`` as adapter ``name``; raises as :meth:`check_room` does."""
        self.check_room(name, piece)
        self.deltas[name] = piece

    def remove_delta(self, name: str) -> None:
        """Forget adapter ``name``; the base is as it was without it."""
        del self.deltas[name]

    def swap_delta(self, name: str, other: Piece) -> None:
        """Give adapter ``name`` the tensors of ``other``, in its own memory."""
        self.restore_base()
        self.pieces()[name].take(other)
        self.sync()

    def active_deltas(self) -> list[Any]:
        """The pieces a forward applies, in the order they were activated."""
        return [self.deltas[name] for name in self.active if name in self.deltas]

    def activate(self, names: tuple[str, ...]) -> None:
        """Apply the pieces of these adapters from now on."""
        self.active = names
        self.sync()

    def restore_base(self) -> None:
        """Give the base its original values, where a piece had written its own."""

    def sync(self) -> None:
        """Make the base's weight what a forward would use now."""
