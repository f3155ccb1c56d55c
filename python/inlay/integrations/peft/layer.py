"""The PEFT layer of S²FT: containers and bookkeeping are PEFT's, everything computed is inlay's delta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...bases.linear import is_conv1d, out_in_view
from ...nn.tuned_linear import is_watched
from ...ops.swiglu import swiglu
from ...pieces import keeping_width
from ...pieces.linear import Delta, SubmatrixDelta
from ...pieces.linear.submatrix import Side
from .base import OnQuantized, fused_base, weight_like
from .internals import BaseTunerLayer, BufferDict, check_adapters_to_merge


class WideParameters(nn.ParameterDict):
    """Values by adapter name, which stay fp32 where the model goes to 16 bits."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(keeping_width(fn), recurse)


class HeldDelta(SubmatrixDelta):
    """A submatrix delta whose tensors are where PEFT looks for them: in a layer's containers, by adapter name."""

    def __init__(self, layer: S2FTLinear, name: str, side: Side) -> None:
        Delta.__init__(self, layer.in_features, layer.out_features)  # not SubmatrixDelta's: the tensors exist
        self.side = side
        self.holder = (layer, name)

    @property
    def s2ft_values(self) -> nn.Parameter:
        layer, name = self.holder
        return layer.s2ft_values[name]

    @property
    def s2ft_indices(self) -> Tensor:
        layer, name = self.holder
        return layer.s2ft_indices[name]


class S2FTLinear(nn.Module, BaseTunerLayer):
    """A linear and the S²FT adapters on it.

    Args:
        base_layer: ``nn.Linear``, Conv1D or inlay's quantized linear; called, or handed to the op where that is the
            same. Its weight stays frozen.
        adapter_name, indices, side: the first adapter; see :class:`inlay.pieces.linear.SubmatrixDelta`.
        where: the linear's name, for errors.
    """

    adapter_layer_names = ("s2ft_values",)
    other_param_names = ("s2ft_indices", "s2ft_deltas", "s2ft_unloaded")

    def __init__(self, base_layer: nn.Module, adapter_name: str, indices: Tensor, side: Side, where: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        out_features, in_features = weight_like(base_layer).shape
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.s2ft_values = WideParameters()
        self.s2ft_indices = BufferDict(persistent=True)
        self.s2ft_deltas: dict[str, HeldDelta] = {}
        self.s2ft_unloaded: dict[str, bool] = {}  # adapters whose channels are still to come from a file
        self.s2ft_originals: list[tuple[int, Tensor, Tensor]] = []  # what merging overwrote: dim, channels, values
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, indices, side, where)

    def update_layer(
        self, adapter_name: str, indices: Tensor, side: Side, where: str, inference_mode: bool = False
    ) -> None:
        """Add an adapter, with ``ΔW = 0``."""
        fresh = SubmatrixDelta(weight_like(self.base_layer), indices, side, where)
        self.s2ft_values[adapter_name] = fresh.s2ft_values
        self.s2ft_indices[adapter_name] = fresh.s2ft_indices
        self.s2ft_deltas[adapter_name] = HeldDelta(self, adapter_name, side)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def watched(self) -> bool:
        """True if hooks rely on calls of this module; fused blocks then call it."""
        return is_watched(self)

    def applied(self) -> list[HeldDelta]:
        """The deltas that a forward adds to the base: none where they are disabled, or merged into it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        names = [name for name in self.active_adapters if name in self.s2ft_deltas]
        for name in names:
            if name in self.s2ft_unloaded:
                raise RuntimeError(
                    f"adapter {name!r} was made from a saved config whose strategy needs calibration data: wanted its "
                    "saved channels, got none; load it with PeftModel.from_pretrained or load_adapter, or make a new "
                    "S2FTConfig(..., calibration=batches)"
                )
        return [self.s2ft_deltas[name] for name in names]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        deltas = self.applied()
        found = fused_base(self.base_layer) if len(deltas) == 1 and not (args or kwargs) else None
        if found is not None:
            base, tensors = found
            return deltas[0].linear(x, base, *tensors)
        y = self.base_layer(x, *args, **kwargs)
        for delta in deltas:
            y = delta.after(y, x)
        return y

    def forward_gated(self, gate: Tensor, up: Tensor, act: str) -> Tensor:
        """``self(act(gate) * up)``: a delta that can rebuild its input saves none of it."""
        deltas = self.applied()
        found = fused_base(self.base_layer) if len(deltas) == 1 else None
        if found is None:
            return self(swiglu(gate, up, act))
        base, tensors = found
        return deltas[0].gated_linear(gate, up, act, base, *tensors)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``ΔW``, fp32, in the layout of the base weight."""
        delta = self.s2ft_deltas[adapter].weight_delta().detach()
        return delta.t() if is_conv1d(self.base_layer) else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters into the base weight, each rounded once; :meth:`unmerge` restores the very bits."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.s2ft_deltas:
                continue
            delta, weight = self.s2ft_deltas[name], out_in_view(self.base_layer)
            merged, _ = delta.merge(weight, None)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"the merged weight holds NaN or infinity; adapter {name!r} seems to be broken")
            channels = delta.s2ft_indices.clone()
            self.s2ft_originals.append((delta.dim, channels, weight.index_select(delta.dim, channels)))
            weight.copy_(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        weight = out_in_view(self.base_layer)
        while self.s2ft_originals:
            dim, channels, original = self.s2ft_originals.pop()
            weight.index_copy_(dim, channels.to(weight.device), original.to(weight.device))
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move, but keep the values in fp32 whatever the base's dtype is."""
        if adapter_name in self.s2ft_values and self.s2ft_values[adapter_name].device.type != "meta":
            device = device if device is not None else self.base_layer.weight.device
            self.s2ft_values[adapter_name] = self.s2ft_values[adapter_name].to(device)
            self.s2ft_indices[adapter_name] = self.s2ft_indices[adapter_name].to(device)

    def checked(self, adapter_name: str, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
        """An adapter file's tensors for this layer, channels sorted; ValueError as :meth:`inlay.pieces.Piece.load`.

        PEFT copies what a file holds as it is; a channel out of range would be read and written past the weight.
        """
        if "s2ft_indices" not in tensors:
            raise ValueError(f"{where}: wanted s2ft_indices, got {sorted(tensors)}; the file is incomplete")
        side = self.s2ft_deltas[adapter_name].side
        fresh = SubmatrixDelta(weight_like(self.base_layer), tensors["s2ft_indices"], side, where)
        return fresh.load(tensors, where).tensors()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "s2ft." + super().__repr__()


class S2FTQuantizedLinear(OnQuantized, S2FTLinear):
    """The same on inlay's quantized linears."""
