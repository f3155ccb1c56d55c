"""Which linears get which base: what ``tune(base=...)`` and ``QuantizationConfig`` take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from ..targets import linears, output_head_names, suffix_match
from ..task_head import task_head
from .linear import computes_linear, is_conv1d
from .quantized import STORAGES, QuantizedLinear, QuantizedWeight, Storage


@dataclass
class BaseConfig:
    """How to quantize the linears of a model.

    Attributes:
        base: "nf4", "fp4" or "int8".
        blocksize: weights per scale of the four-bit bases.
        double_quant: store those scales in 8 bits.
        skip_modules: name suffixes of linears to leave dense; None leaves out the output head, or a task's.
        overrides: base by name suffix, None for dense, e.g. ``{"down_proj": "int8", "o_proj": None}``.

    Raises:
        ValueError: an unknown base or blocksize.
    """

    base: str = "nf4"
    blocksize: int = 64
    double_quant: bool = False
    skip_modules: Sequence[str] | None = None
    overrides: dict[str, str | None] = field(default_factory=dict)
    whole: ClassVar[tuple[str, ...]] = ()  # see leaving()

    def __post_init__(self) -> None:
        for base in (self.base, *self.overrides.values()):
            if base is not None:
                self.storage(base)

    @classmethod
    def of(cls, base: str | BaseConfig) -> BaseConfig:
        """``base`` itself, or the default config of the base so named."""
        return base if isinstance(base, BaseConfig) else cls(base)

    def storage(self, base: str | None = None, rows: int = 1, columns: int = 1) -> Storage:
        """The storage of a ``[rows, columns]`` weight; ValueError on an unknown base."""
        base = base if base is not None else self.base
        if base not in STORAGES:
            raise ValueError(f"base: wanted one of {sorted(STORAGES)} or None, got {base!r}")
        kind, options = STORAGES[base]
        return kind(rows, columns, **options, **kind.options_from(self))

    def base_of(self, name: str) -> str | None:
        """The base of the linear ``name``, None for dense."""
        for suffix, base in self.overrides.items():
            if suffix_match(name, suffix):
                return base
        skipped = any(suffix_match(name, suffix) for suffix in self.skip_modules or ())
        return None if skipped else self.base

    def names(self, model: nn.Module) -> dict[str, str]:
        """Base by name of every linear of ``model`` to quantize. ValueError if an override or a skip names none.

        Linears that compute something else than ``x·Wᵀ`` (some routers) stay dense.
        """
        found = linears(model)
        for suffix in (*self.overrides, *(self.skip_modules or ())):
            if not any(suffix_match(name, suffix) for name in found):
                raise ValueError(f"skip_modules or overrides name {suffix!r}, which no linear of this model ends in")
        heads = output_head_names(model) | set(_within(found, task_head(model))) if self.skip_modules is None else set()
        heads = {head for head in heads if not any(suffix_match(head, suffix) for suffix in self.overrides)}
        dense = heads | set(self.whole) | {name for name, module in found.items() if not computes_linear(module)}
        chosen = {name: self.base_of(name) for name in found if name not in dense}
        return {name: base for name, base in chosen.items() if base is not None}

    def leaving(self, whole: Iterable[str]) -> BaseConfig:
        """The same, but linears whose weights are among the tensors ``whole`` (state-dict keys), stay dense."""
        config = replace(self)
        config.__dict__["whole"] = tuple(key.rpartition(".")[0] for key in whole if not key.endswith(".bias"))
        return config

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values, "skip_modules": None if self.skip_modules is None else list(self.skip_modules)}


def _within(names: Iterable[str], outer: Sequence[str]) -> list[str]:
    return [name for name in names if any(name == entry or name.startswith(f"{entry}.") for entry in outer)]


def quantize_linears(
    model: nn.Module,
    config: BaseConfig,
    make: Callable[[nn.Module, Storage, str], QuantizedLinear] = QuantizedLinear.of,
) -> int:
    """Replace the linears ``config`` names by quantized ones, in place, each dense one freed in turn; how many.

    Args:
        make: builds the quantized linear of a dense one, given its storage and name.

    Raises:
        ValueError: a linear is tuned, or quantized otherwise; then nothing has changed.
    """
    storages = {
        name: _storage(model.get_submodule(name), base, config, name) for name, base in config.names(model).items()
    }
    count = 0
    for name, storage in storages.items():
        if storage is not None:
            model.set_submodule(name, make(model.get_submodule(name), storage, name))
            count += 1
    return count


def _storage(module: nn.Module, base: str, config: BaseConfig, name: str) -> Storage | None:
    """The storage to give ``module``, None if it has it already."""
    if hasattr(module, "deltas"):
        raise ValueError(f"{name} is tuned: its base cannot be quantized any more; merge first, or pass base=None")
    out_features, in_features = (
        (module.nf, module.nx) if is_conv1d(module) else (module.out_features, module.in_features)
    )
    storage = config.storage(base, out_features, in_features)
    if not isinstance(module, QuantizedWeight):
        return storage
    if module.storage != storage:
        raise ValueError(f"{name}: wanted {storage}, but it is quantized as {module.storage}; load the dense model")
    return None
