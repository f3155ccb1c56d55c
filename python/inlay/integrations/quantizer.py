"""transformers loads models into inlay's quantized bases: ``from_pretrained(..., quantization_config=...)``.

A dense checkpoint is quantized tensor by tensor while it is read, so that the dense model never exists. One that
bitsandbytes or inlay has quantized is taken as it is; bitsandbytes need not be installed. ``save_pretrained`` writes
what transformers + bitsandbytes load.

Registers the quantizer "inlay" with transformers on import.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..bases import BaseConfig, FourBit, QuantizedLinear, Storage
from ..bases.bitsandbytes_format import KEYS, from_bitsandbytes, is_quantized, missing_keys, to_bitsandbytes
from ..bases.linear import is_conv1d, out_in_view
from ..bases.quantized import QuantizedWeight
from ..targets import is_linear

NAME = "inlay"
_UNSET_BY_US = ("is_loaded_in_4bit", "is_loaded_in_8bit")
_PACKED = {"U8", "I8"}


class QuantizationConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes; the options are those of :class:`inlay.BaseConfig`.

    Saved in ``config.json`` as bitsandbytes' own config where that can say it: all four-bit, or all int8.
    """

    def __init__(
        self,
        base: str = "nf4",
        *,
        double_quant: bool = False,
        blocksize: int = 64,
        skip_modules: Sequence[str] | None = None,
        overrides: Mapping[str, str | None] | None = None,
        quant_method: str = NAME,
    ) -> None:
        if quant_method != NAME:
            raise ValueError(f"quant_method: wanted {NAME!r}, got {quant_method!r}; use its own config class")
        self.quant_method = NAME
        self.options = BaseConfig(base, blocksize, double_quant, skip_modules, dict(overrides or {}))
        self.found: dict[str, Any] = {}  # what a loaded model holds; see `record`

    @classmethod
    def from_bitsandbytes(cls, values: Mapping[str, Any]) -> QuantizationConfig:
        """The config of a checkpoint that bitsandbytes quantized; ``values`` as in its ``config.json``."""
        four_bit = bool(values.get("load_in_4bit", values.get("_load_in_4bit", False)))
        return cls(
            values.get("bnb_4bit_quant_type", "fp4") if four_bit else "int8",
            double_quant=four_bit and bool(values.get("bnb_4bit_use_double_quant", False)),
        )

    def record(self, model: nn.Module) -> None:
        """Note what ``model`` holds: the saved config has to say which linears are not quantized."""
        quantized = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
        kinds = {m.storage.quant_type if isinstance(m.storage, FourBit) else "int8" for m in quantized}
        self.found = {
            "kinds": sorted(kinds),
            "nested": any(isinstance(m.storage, FourBit) and m.storage.double_quant for m in quantized),
            "dense": [n for n, m in model.named_modules() if is_linear(m) and not isinstance(m, QuantizedWeight)],
            "compute_dtype": Counter(str(m.compute_dtype).removeprefix("torch.") for m in quantized).most_common(1),
        }

    def to_dict(self) -> dict[str, Any]:
        kinds = self.found.get("kinds", [])
        if kinds and (kinds == ["int8"] or "int8" not in kinds):
            return self._as_bitsandbytes(kinds)
        return {"quant_method": NAME, **self.options.to_dict()}

    def _as_bitsandbytes(self, kinds: Sequence[str]) -> dict[str, Any]:
        four_bit = kinds != ["int8"]
        values: dict[str, Any] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four_bit,
            "load_in_8bit": not four_bit,
            "llm_int8_skip_modules": self.found["dense"],
        }
        if four_bit:
            values |= {
                "bnb_4bit_quant_type": self.options.base if self.options.base in kinds else kinds[0],
                "bnb_4bit_use_double_quant": self.found["nested"],
                "bnb_4bit_compute_dtype": self.found["compute_dtype"][0][0],
                "bnb_4bit_quant_storage": "uint8",
            }
        return values


class Quantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model with a :class:`QuantizationConfig`."""

    requires_calibration = False
    serialized_names = {"weight": list(KEYS)}
    quantization_config: QuantizationConfig

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.chosen: dict[str, str] = {}  # base by name of the linears to quantize while loading

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            check_complete(checkpoint_files or [])
            return
        tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
        precise = tuple(model._keep_in_fp32_modules or ())
        for name, base in self.quantization_config.options.names(model).items():
            if f"{name}.weight" not in tied and not set(name.split(".")) & set(precise):
                self.chosen[name] = base
        if not self.chosen:
            raise ValueError(f"{self.quantization_config.options} names no linear of this {type(model).__name__}")

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and name in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _Deserialize}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.quantization_config.record(model)
        # What was read is described by the storages now: nothing to undo when the model is saved.
        model._weight_conversions = [
            c for c in getattr(model, "_weight_conversions", None) or [] if not _is_ours(getattr(c, "operations", ()))
        ]
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        self.quantization_config.record(model)
        return state_dict_as_bitsandbytes(model), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # or Trainer refuses anything that is not a PeftModel

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a saved config holds its name
        for name, module in quantized_linears(model).items():
            model.set_submodule(
                name, module.to_dense(module.storage.dequantize(dtype or module.compute_dtype, *module.tensors))
            )
        return model


class _Quantize(ConversionOps):
    """A dense weight of the checkpoint becomes a quantized linear; the dense tensor dies with the call."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        made: dict[str, Any] = {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = key.removesuffix(".weight")
            base = self.hf_quantizer.chosen.get(name)
            if base is None:  # came along with one that is quantized
                made[key] = weight
                continue
            if is_conv1d(model.get_submodule(name)):
                weight = weight.t()
            storage = self.hf_quantizer.quantization_config.options.storage(base, *weight.shape)
            tensors = storage.quantize(weight, name)
            made |= install(model, name, storage, tensors, weight.dtype, kwargs.get("missing_keys"))
        return made


class _Deserialize(ConversionOps):
    """The tensors of one module in a quantized checkpoint."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        held = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        if list(held) == ["weight"] and held["weight"].is_floating_point():
            return {"weight": held["weight"].to(model.get_parameter_or_buffer(full_layer_name).dtype)}
        name = full_layer_name.removesuffix(".weight")
        storage, tensors, _ = from_bitsandbytes(held, name)
        dtype = model.get_submodule(name).weight.dtype
        return install(model, name, storage, tensors, dtype, kwargs.get("missing_keys"))


def _is_ours(operations: Sequence[Any]) -> bool:
    return any(isinstance(op, _Deserialize) for op in operations)


def install(
    model: nn.Module,
    name: str,
    storage: Storage,
    tensors: tuple[Tensor | None, ...],
    dtype: torch.dtype,
    missing: set[str] | None = None,
) -> dict[str, Tensor]:
    """Put a quantized linear at ``name``; its parameters by full name, for transformers to place."""
    old = model.get_submodule(name)
    shape = tuple(out_in_view(old).shape)
    if (storage.rows, storage.columns) != shape:
        raise ValueError(
            f"{name}: wanted a weight of {shape}, got {(storage.rows, storage.columns)} from the checkpoint"
        )
    linear = QuantizedLinear(storage, tensors, old.bias, dtype, is_conv1d(old)).train(old.training)
    model.set_submodule(name, linear)
    missing = missing if missing is not None else set()
    missing.discard(f"{name}.weight")
    linear._is_hf_initialized = f"{name}.bias" not in missing
    return {f"{name}.{key}": parameter for key, parameter in linear.named_parameters() if key != "bias"}


def check_complete(files: Sequence[str]) -> None:
    """ValueError naming the first quantized linear of these safetensors that lacks tensors."""
    found: dict[str, set[str]] = {}
    packed: set[str] = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"wanted a quantized checkpoint in safetensors, got {Path(file).name}; save it as such")
        with safe_open(str(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no iterator)
                leaf = next((k for k in sorted(KEYS, key=len, reverse=True) if key.endswith("." + k)), None)
                if leaf is None:
                    continue
                name = key[: -len(leaf) - 1]
                found.setdefault(name, set()).add(leaf)
                if leaf == "weight" and opened.get_slice(key).get_dtype() in _PACKED:
                    packed.add(name)
    for name, keys in found.items():
        if (is_quantized(keys) or name in packed) and missing_keys(keys):
            raise ValueError(
                f"the checkpoint is incomplete: {name} has {sorted(keys)} without {missing_keys(keys)}; "
                "download or save it again"
            )


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Every linear of ``model`` that is quantized and not tuned, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def state_dict_as_bitsandbytes(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` with quantized linears under bitsandbytes' keys."""
    held = model.state_dict()
    for name, module in quantized_linears(model).items():
        for key in module.storage.names:
            held.pop(f"{name}.{key}", None)
        tensors = tuple(None if t is None else t.detach() for t in module.tensors[:-1])
        for key, tensor in to_bitsandbytes(module.storage, tensors, module.compute_dtype).items():
            held[f"{name}.{key}"] = tensor
    return held


def adopt(model: nn.Module) -> None:
    """Make a transformers model whose linears were converted to ours one that our quantizer loaded."""
    storages = [module.storage for module in model.modules() if isinstance(module, QuantizedWeight)]
    four_bit = [storage for storage in storages if isinstance(storage, FourBit)]
    base = four_bit[0].quant_type if four_bit else "int8"
    config = QuantizationConfig(base, double_quant=any(storage.double_quant for storage in four_bit))
    config.record(model)
    model.hf_quantizer = Quantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, NAME
    for attribute in _UNSET_BY_US:
        if getattr(model, attribute, False):
            setattr(model, attribute, False)


def asked_options(asked: Any) -> BaseConfig:
    """The base that a quantization config (ours, bitsandbytes' or a dict) means; ValueError for another library's."""
    values = asked if isinstance(asked, dict) else asked.to_dict()
    if values.get("quant_method") == NAME:
        return BaseConfig(**{key: value for key, value in values.items() if key != "quant_method"})
    if "load_in_4bit" in values or "load_in_8bit" in values or values.get("quant_method") == "bitsandbytes":
        return QuantizationConfig.from_bitsandbytes(values).options
    kind = values.get("quant_method") or type(asked).__name__
    raise ValueError(f"quantization_config: wanted inlay's or bitsandbytes', got {kind!r}")


def check_holds(model: nn.Module, asked: BaseConfig, path: str | Path) -> nn.Module:
    """``model``, loaded from a quantized checkpoint; ValueError if a linear is quantized otherwise than ``asked``."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            base = asked.base_of(name)
            wanted = None if base is None else asked.storage(base, module.out_features, module.in_features)
            if module.storage != wanted:
                raise ValueError(
                    f"{path} holds {name} quantized as {module.storage}, and quantization_config asks for "
                    f"{wanted or 'a dense weight'}; leave quantization_config out, or load the dense checkpoint"
                )
    return model


def from_pretrained(path: str | Path, *, auto_class: Any = None, **kwargs: Any) -> nn.Module:
    """A transformers model, dense or quantized, by its own ``from_pretrained``; quantized ones into inlay's bases.

    transformers hands a checkpoint that bitsandbytes quantized to bitsandbytes; this does not, and needs none.

    Args:
        path: a local directory or cached name.
        auto_class: which class loads it, e.g. ``AutoModelForSequenceClassification``; the checkpoint's own if None.
        kwargs: for ``from_pretrained``, e.g. ``dtype``, ``quantization_config=inlay.QuantizationConfig("nf4")``.

    Raises:
        ValueError: a ``quantization_config`` that asks for another base than a quantized checkpoint holds.
    """
    import transformers

    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(path)
    existing = getattr(config, "quantization_config", None)
    asked: BaseConfig | None = None
    if existing is not None:
        values = existing if isinstance(existing, dict) else existing.to_dict()
        if values.get("quant_method") == "bitsandbytes" or "load_in_4bit" in values or "load_in_8bit" in values:
            ours = QuantizationConfig.from_bitsandbytes(values)
            config.quantization_config = ours.to_dict()
        given = kwargs.pop("quantization_config", None)  # the checkpoint says what it holds
        asked = None if given is None else asked_options(given)
    if auto_class is None:
        names = getattr(config, "architectures", None) or []
        auto_class = getattr(transformers, names[0], None) if names else None
        auto_class = auto_class or transformers.AutoModelForCausalLM
    model = auto_class.from_pretrained(path, config=config, **kwargs)
    return model if asked is None else check_holds(model, asked, path)


if NAME not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(NAME)(QuantizationConfig)
    register_quantizer(NAME)(Quantizer)
