"""PEFT's LoRA with inlay's fused linears under it: PEFT's layers, configs and files; only ``forward`` is ours."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...bases.quantized import QuantizedLinear
from ...nn.tuned_linear import is_watched
from ...ops._registry import compute_dtype
from ...ops.lora_linear import lora_linear, swiglu_lora_linear
from ...ops.swiglu import swiglu
from .base import OnQuantized, fused_base, is_ours, refuse_tuned
from .internals import BaseTunerLayer, LoraConfig, LoraLinear, check_internals, dispatch_default

#: Initializations that leave the base weight alone; others write into it, which a packed weight cannot take.
_QUIET_INITS = (True, False, "gaussian", "orthogonal")


def accelerate_lora(config: Any) -> Any:
    """Make a stock ``peft.LoraConfig`` run on inlay's ops; returns ``config`` itself.

    ``get_peft_model(model, accelerate_lora(LoraConfig(...)))``: on dense linears, Conv1D and inlay's quantized linears
    the base product, the low-rank branch and their backward are one op. Everything else is PEFT's own code, and the
    adapter it saves is a plain LoRA. What the op cannot do (DoRA and other variants, ``lora_bias``, a trained bias,
    several active adapters, mixed batches) runs PEFT's own forward, with a warning where the config asks for it.

    To load: ``PeftModel.from_pretrained(model, path, config=accelerate_lora(LoraConfig.from_pretrained(path)))``.

    Raises:
        TypeError: not a ``LoraConfig``, or a subclass of it, whose tuner has layers of its own.
        RuntimeError: PEFT's internals moved.
    """
    if type(config) is not LoraConfig:
        raise TypeError(f"accelerate_lora: wanted a peft.LoraConfig, got {type(config).__name__}; pass that to PEFT")
    check_internals()
    config._register_custom_module({nn.Linear: make_layer, Conv1D: make_layer})
    if slow := beyond_the_op(config):
        warnings.warn(f"accelerate_lora: {', '.join(slow)}: PEFT's own layers run, nothing is fused", stacklevel=2)
    return config


def beyond_the_op(config: Any) -> list[str]:
    """Options of ``config`` with which no layer can run the fused op."""
    asked = [f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")]
    named = [f"{name}={getattr(config, name)!r}" for name in (*asked, "lora_bias") if getattr(config, name)]
    if config.bias != "none":
        named.append(f"bias={config.bias!r}")
    if config.init_lora_weights == "mica":
        named.append('init_lora_weights="mica"')
    return named


def make_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """What PEFT calls for each target: its own layer with our forward, or None to let PEFT go on looking."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    refuse_tuned(base, kwargs.get("target_name", "this linear"))
    if not is_ours(base):
        return None
    quantized = isinstance(base, QuantizedLinear)
    if quantized:
        check_fits_quantized(config)
    layer = dispatch_default(target, adapter_name, config=config, **kwargs)
    if type(layer) is LoraLinear:  # not a wrapper of a bare nn.Parameter
        layer.__class__ = FusedQuantizedLoraLinear if quantized else FusedLoraLinear
    return layer


def check_fits_quantized(config: Any) -> None:
    """Raise ValueError if ``config`` would train or overwrite part of a quantized base, which nothing would notice."""
    wrong = None
    if config.bias != "none":
        wrong = f"bias={config.bias!r} trains the base's bias"
    elif config.init_lora_weights not in _QUIET_INITS:
        wrong = f"init_lora_weights={config.init_lora_weights!r} writes into the base weight"
    elif getattr(config, "kasa_config", None) is not None:
        wrong = "kasa_config writes into the base weight"
    if wrong:
        raise ValueError(
            f"wanted a LoraConfig that leaves a quantized base as it is, got one where {wrong}; use bias='none' and "
            f"init_lora_weights of {_QUIET_INITS}, or inlay.tune with inlay.LoRA(init='loftq')"
        )


class FusedLoraLinear(LoraLinear):
    """PEFT's ``lora.Linear`` whose forward is one op where that computes the same."""

    @property
    def watched(self) -> bool:
        """True if hooks rely on calls of this module; fused blocks then call it."""
        return is_watched(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fused = None if args or kwargs else self.factors(x)
        if fused is None:
            return super().forward(x, *args, **kwargs)
        a, b, scale, drop, base, tensors = fused
        return lora_linear(x, a, b, scale, base, *tensors, dropped=None if drop is None else drop(x))

    def forward_gated(self, gate: Tensor, up: Tensor, act: str) -> Tensor:
        """``self(act(gate) * up)``, keeping gate and up instead of their product."""
        fused = self.factors(gate)
        if fused is None or fused[3] is not None:  # dropout makes another tensor of the product; nothing to rebuild
            return self(swiglu(gate, up, act))
        a, b, scale, _, base, tensors = fused
        return swiglu_lora_linear(gate, up, act, a, b, scale, base, *tensors)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, float, nn.Module | None, Any, tuple] | None:
        """``A, B, scale, dropout, base, tensors`` for the op, or None where PEFT's own forward must run."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or not self.cast_input_dtype_enabled:
            return None
        name = names[0]
        a, b = self.lora_A[name], self.lora_B[name]
        if name in self.lora_variant or b.bias is not None or is_watched(a) or is_watched(b):
            return None
        if not a.weight.dtype == b.weight.dtype == compute_dtype(x):
            return None
        found = fused_base(self.base_layer)
        if found is None:
            return None
        drop = self.lora_dropout[name]
        drops = isinstance(drop, nn.Dropout) and drop.training and drop.p > 0
        return a.weight, b.weight, self.scaling[name], drop if drops else None, *found


class FusedQuantizedLoraLinear(OnQuantized, FusedLoraLinear):
    """The same on inlay's quantized linears."""

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        check_fits_quantized(config)
        super().update_layer(adapter_name, *args, config=config, **kwargs)
