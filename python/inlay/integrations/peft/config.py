"""``S2FTConfig``: S²FT for PEFT's own functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field, fields
from typing import Any

from ...adapters.files import DELTAS_ONLY
from ...methods.base import Calibration
from ...methods.s2ft import S2FT
from ...version import __version__
from .internals import PeftConfig, TypeName

PEFT_TYPE = TypeName(S2FT.peft_type)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class S2FTConfig(PeftConfig):
    """S²FT as a PEFT method: ``get_peft_model(model, S2FTConfig(ratio=0.03))``, ``SFTTrainer(peft_config=...)``.

    Options are those of :class:`inlay.S2FT` and, where that has none, PEFT's. The same options choose the same channels
    as ``inlay.tune``. Adapters are saved and loaded by PEFT's code once this module has been imported, and both
    ``PeftModel.from_pretrained`` and ``inlay.load`` read the other's additive ones.

    Args:
        calibration: batches of forward arguments, for the strategies that need data; not saved.

    Raises:
        ValueError: an option that :class:`inlay.S2FT` refuses; in-place or exact channels, which change the base and
            cannot be one of PEFT's adapters.
    """

    target_modules: set[str] | list[str] | str | None = _option(
        None, "List of module names or a regex; None for o_proj and down_proj by the model's own names."
    )
    exclude_modules: set[str] | list[str] | str | None = _option(None, "Module names, or a regex, to leave alone.")
    ratio: Any = _option(0.03, "Fraction of channels to train, or a dict by target suffix.")
    channels: Any = _option(None, "Exact number of channels instead of `ratio`, or a dict by target suffix.")
    side: Any = _option("auto", '"in", "out" or "auto" (by target), or a dict by target suffix.')
    granularity: Any = _option("auto", 'Channels per group; "auto": whole heads for attention linears, else 1.')
    strategy: str = _option("random", '"random", "weight", "activation", "product" or "gradient".')
    select: str = _option("smallest", '"smallest" or "largest" scores.')
    update: str = _option("additive", "Always additive under PEFT; inlay.tune has the in-place form.")
    keep: str = _option("additive", "Always additive under PEFT; inlay.tune has the exact form.")
    seed: int = _option(0, "Seed of random selection.")
    layers_to_transform: list[int] | int | None = _option(None, "Index or indices of the blocks to tune.")
    layers_pattern: list[str] | str | None = _option(None, "Name of the list of blocks, if not the usual one.")
    modules_to_save: list[str] | None = _option(None, "Modules to train and save as a whole.")
    fused_blocks: bool = _option(True, "Fuse norms, gated MLPs and attention where proven to be the same.")
    bias: str = _option("none", "Biases are not trained.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _option(
        None, "Tokens of the embedding to train, as in LoraConfig."
    )
    target_parameters: list[str] | None = _option(None, "Not under PEFT; inlay.tune trains channels of experts.")
    experts: list[int] | None = _option(None, "Not under PEFT; inlay.tune trains channels of experts.")
    inlay: dict[str, Any] | None = _option(None, "What inlay.load reads; filled in.")
    calibration: InitVar[Iterable[Mapping[str, Any]] | None] = None

    def __post_init__(self, calibration: Calibration | None) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list | tuple):
                setattr(self, name, set(value))
        fixed = {"update": "additive", "keep": "additive", "bias": "none", "target_parameters": None, "experts": None}
        for name, wanted in fixed.items():
            if (got := getattr(self, name)) != wanted:
                raise ValueError(f"S2FTConfig: {name}: wanted {wanted!r}, got {got!r}; inlay.tune has the other forms")
        self.held_calibration = calibration
        self.loaded = self.inlay is not None  # a file's config: its channels come from the file
        options = self.method.stored_options()
        sample = (self.inlay or {}).get("base_sample", {})
        self.inlay = {"base": None, "base_sample": sample, "format": DELTAS_ONLY, "options": options}
        self.inlay["version"] = __version__

    @property
    def method(self) -> S2FT:
        """The same options as :class:`inlay.S2FT`."""
        shared = {f.name for f in fields(S2FT)} & {f.name for f in fields(self)}
        values: dict[str, Any] = {name: getattr(self, name) for name in sorted(shared)}
        for name, value in values.items():
            values[name] = sorted(value) if isinstance(value, set) else value
        return S2FT(**values)
