"""What inlay's LoRA and S2FT layers in PEFT share: running on a base directly, and merging out of a quantized one."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...bases.linear import base_of, is_conv1d, out_in_view
from ...bases.quantized import QuantizedLinear
from ...nn.tuned_linear import TunedLinear, is_watched
from .internals import check_adapters_to_merge

# To a type checker these mixins are the PEFT layers they will be mixed into.
if TYPE_CHECKING:
    from .internals import LoraLinear as _Layer
else:
    _Layer = object


def is_ours(module: nn.Module) -> bool:
    """True for linears whose products inlay's ops compute: plain dense ones, Conv1D, and inlay's quantized ones.

    Not for those of other quantization libraries, which hide in subclasses of ``nn.Linear`` or in its weight's class.
    """
    if isinstance(module, QuantizedLinear):
        return True
    return (type(module) is nn.Linear or is_conv1d(module)) and type(module.weight) is nn.Parameter


def fused_base(module: nn.Module) -> tuple[Any, tuple[Tensor | None, ...]] | None:
    """Base and tensors to hand to an op, or None where the module itself must be called.

    That is where hooks rely on the call (offloading), or where its weight or bias trains: the ops give those no
    gradient.
    """
    if not is_ours(module) or is_watched(module):
        return None
    if isinstance(module, QuantizedLinear):
        found: tuple[Any, tuple[Tensor | None, ...]] = module.storage, module.tensors
    else:
        found = base_of(module), (module.weight, module.bias)
    return None if any(tensor is not None and tensor.requires_grad for tensor in found[1]) else found


def weight_like(module: nn.Module) -> Tensor:
    """A stand-in for the dense weight ``[out, in]``: its shape, device and dtype, without dequantizing."""
    if not isinstance(module, QuantizedLinear):
        return out_in_view(module)
    one = torch.empty(1, dtype=module.compute_dtype, device=next(module.parameters()).device)
    return one.expand(module.out_features, module.in_features)


def refuse_tuned(module: nn.Module, name: str) -> None:
    """Raise ValueError if ``module`` carries an adapter of ``inlay.tune``, which PEFT's code does not know of."""
    if isinstance(module, TunedLinear):
        raise ValueError(
            f"{name} is tuned by inlay.tune already: wanted a plain model; use one of the two, "
            "or inlay.merge the model first"
        )


class OnQuantized(_Layer):
    """Mixin of a PEFT layer on a quantized base: merges into a dense linear, never back into the packed weight."""

    base_layer: Any

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "this base is quantized: an adapter merged into it in place would be rounded away. merge_and_unload makes "
            "these linears dense; or save the adapter and merge it into the dense checkpoint"
        )

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT's hook for layers that unload in their own way."""
        packed = self.base_layer
        if not merge:
            packed.__class__ = _Returned
            return packed
        weight = packed.storage.dequantize(torch.float32, *packed.tensors)
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self._get_available_adapters():
                weight += self.get_delta_weight(name).to(weight)
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(f"the merged weight holds NaN or infinity; one of {adapter_names} seems to be broken")
        warnings.warn(
            "merged into dequantized weights: the linears that were tuned are dense now and keep the quantization "
            "error; save the adapter and merge it into the dense checkpoint to be rid of it",
            stacklevel=2,
        )
        self.base_layer = packed.to_dense(weight.to(packed.compute_dtype))  # PEFT goes on to read its weight here
        return self.base_layer


class _Returned(QuantizedLinear):
    """A quantized linear that PEFT is putting back, assigning the weight it has already: the first such is let pass."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            object.__setattr__(self, "__class__", QuantizedLinear)
        else:
            super().__setattr__(name, value)
