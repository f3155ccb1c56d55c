"""What every method is: a config dataclass that plans which pieces sit where, and what happens over time."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ..bases import BaseConfig, quantize_linears
from ..pieces import Piece, Whole
from ..schedules import Schedule
from ..sites import Site
from ..targets import resolve

#: Calibration data: batches of keyword arguments for the model's forward.
Calibration = Iterable[Mapping[str, Any]]
_M = TypeVar("_M", bound="Method")
#: What makes the piece of a site once its module is at hand.
Builder = Callable[[nn.Module], Piece]


@dataclass
class Plan:
    """What a method does to a model.

    Attributes:
        pieces: what builds the piece on each linear or other module.
        whole: how each tensor that trains whole is held, by state-dict key.
        schedule: what changes between optimizer steps; None for what the method's :meth:`Method.schedule` says.
    """

    pieces: dict[Site, Builder] = field(default_factory=dict)
    whole: dict[str, Whole] = field(default_factory=dict)
    schedule: Schedule | None = None


#: Methods by the name an adapter file stores.
METHODS: dict[str, type[Method]] = {}


def register(cls: type[_M]) -> type[_M]:
    """Class decorator of every method: puts it in :data:`METHODS`.

    Raises:
        ValueError: the name is taken; or a key that its pieces store under means another piece already.
    """
    if cls.peft_type in METHODS or not cls.peft_type:
        raise ValueError(f"peft_type: wanted a name of its own, got {cls.peft_type!r} for {cls.__name__}")
    METHODS[cls.peft_type] = cls
    return cls


def stored_keys() -> tuple[str, ...]:
    """Every key under which a piece's tensors stand in an adapter file, longest first."""
    found = {key for method in METHODS.values() for piece in method.pieces for key in piece.stored}
    return tuple(sorted(found, key=lambda key: (-len(key), key)))


def check_keys(cls: type, given: Iterable[str]) -> None:
    """Raise TypeError naming the first key that is no field of dataclass ``cls``, with a did-you-mean."""
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            mean = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(f"{cls.__name__} has no option {key!r}; {mean}it takes {known}")


def check_one_of(option: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{option}: wanted one of {tuple(allowed)}, got {value!r}")


@dataclass
class Method:
    """Base of all method configs. Field names follow PEFT's.

    Attributes:
        target_modules: list of name suffixes, a regular expression, ``"all-linear"``, or None for the method's own
            defaults, translated to the model family's names.
        exclude_modules: list of name suffixes or a regular expression of linears to leave alone.
        layers_to_transform: index or indices of the blocks to tune; None for all.
        modules_to_save: name suffixes of modules (or single tensors) that train whole and are saved with the adapter,
            beside the head of a classifier, reward model or question answerer, which does so of itself; [] for none.
        seed: seed of everything drawn at random.
    """

    peft_type: ClassVar[str] = ""
    #: True if :meth:`schedule` chooses what trains, of everything in the plan.
    chooses_over_time: ClassVar[bool] = False
    #: The kinds of pieces it makes.
    pieces: ClassVar[tuple[type[Piece], ...]] = ()

    target_modules: str | Sequence[str] | None = field(default=None, kw_only=True)
    exclude_modules: str | Sequence[str] | None = field(default=None, kw_only=True)
    layers_to_transform: int | Sequence[int] | None = field(default=None, kw_only=True)
    modules_to_save: Sequence[str] | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def linears(self, model: nn.Module, usual: str | Sequence[str] | None = None, **more: Any) -> list[str]:
        """Names of the linears that the options mean; ``usual``: the targets where none are named, or None for those
        that return to the residual stream. ``more``, and errors: :func:`inlay.targets.resolve`."""
        return resolve(
            model,
            usual if self.target_modules is None else self.target_modules,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,
            **more,
        )

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        """What to put where on ``model``, which nothing has changed yet."""
        raise NotImplementedError(f"{type(self).__name__} must define plan(model, calibration)")

    def settled(self, model: nn.Module, calibration: Calibration | None, base: Any = None) -> Method:
        """The method that really tunes: itself, but for one that chooses another by the model, data and base."""
        return self

    @property
    def holding(self) -> Whole:
        """How the tensors that it trains whole are held; a head beside them is always held in fp32."""
        return Whole()

    def schedule(self, model: nn.Module) -> Schedule | None:
        """The schedule of a plan, without what it read from data: an adapter file holds that."""
        return None

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> Piece:
        """Build the piece of ``module`` from an adapter file's ``tensors``."""
        raise NotImplementedError(f"{type(self).__name__} must define restore(module, tensors, where)")

    def rows_held(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The rows of a module's weight of which an adapter file's ``tensors`` hold the values, not changes of them."""
        return None

    @classmethod
    def combine(
        cls, methods: Sequence[Method], weights: Sequence[float], parts: Sequence[Mapping[str, Any]]
    ) -> tuple[Method, dict[str, Any]]:
        """One method and its pieces for the weighted sum of adapters; ``parts``: each one's pieces by module."""
        names = list(dict.fromkeys(name for pieces in parts for name in pieces))
        made = {}
        for name in names:
            here = [(weight, held[name]) for weight, held in zip(weights, parts, strict=True) if name in held]
            made[name] = type(here[0][1]).combine(here, name)
        return dataclasses.replace(methods[0]), made

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-able values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {k: list(v) if isinstance(v, tuple | set) else v for k, v in values.items()}

    def stored_options(self) -> dict[str, Any]:
        """:meth:`to_dict` for an adapter file; without options that are unset and that older readers do not know."""
        newer = ("experts", "modules_to_save", "target_parameters")
        return {key: value for key, value in self.to_dict().items() if key not in newer or value is not None}

    def without_data(self) -> Method:
        """A method that makes pieces of the same shapes without looking at a weight or at data: for estimates."""
        return self

    @property
    def needs_base(self) -> str:
        """What of the options only works together with quantizing the base, "" if nothing does."""
        return ""

    def quantize(self, model: nn.Module, config: BaseConfig, pieces: Mapping[str, Any]) -> None:
        """Quantize the linears of ``model`` that ``config`` names, before ``pieces`` are put on them."""
        quantize_linears(model, config)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], where: Path) -> Method:
        """The method of an ``adapter_config.json`` of this ``peft_type`` that PEFT wrote.

        Raises:
            ValueError: PEFT's files of this kind cannot be read, or this one uses an option that is not here.
        """
        raise ValueError(f"{where}: wanted an adapter saved by inlay, got one without its 'inlay' section")

    def peft_fields(self, pieces: Mapping[str, Any]) -> dict[str, Any]:
        """The options as PEFT's config of this ``peft_type`` stores them; ``pieces``: those of the tuned modules."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Method:
        """Inverse of :meth:`to_dict`; unknown keys raise TypeError with a did-you-mean."""
        check_keys(cls, values)
        return cls(**values)
