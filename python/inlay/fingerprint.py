"""Knowing a base again by values of all its kinds of weights, and how far off another one is.

A mark is the number of elements and, in bf16, the rms and 16 evenly spaced values of a weight: 60 bytes of JSON.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bases import FourBit, QuantizedWeight
from .sharding import is_sharded

_VALUES, _FOR_RMS = 16, 4096
#: Weights that carry no delta, and packed weights, which have to be dequantized to be read: so many of each at most.
_OTHERS, _PACKED = 128, 16
#: Root mean square of the difference that rounding explains: bf16 0.2%; four bits 9 to 12%, more with large blocks.
_ROUNDING = {"dense": 0.01, "int8": 0.03, "four bits": 0.15}


def fingerprint(model: nn.Module, tuned: Sequence[str], leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Marks of the linears ``tuned`` and of other frozen parameters; not of the tensors ``leave_out``, which train."""
    held: dict[str, str] = {}
    weights = _spread([name for name in tuned if _packed(model, name)], _PACKED)
    weights += [name for name in tuned if not _packed(model, name)]
    for name in weights:
        if isinstance(weight := getattr(model.get_submodule(name), "weight", None), Tensor):
            _note(held, f"{name}.weight", weight)
    others = {
        key: parameter
        for key, parameter in model.named_parameters()
        if key not in leave_out and parameter.is_floating_point()
        if key.rpartition(".")[0] not in tuned or parameter.dim() == 3
        if ".deltas." not in key and not isinstance(model.get_submodule(key.rpartition(".")[0]), QuantizedWeight)
    }
    for key in _spread(list(others), _OTHERS):
        _note(held, key, others[key])
    return {"stored": stored_as(model, tuned), "marks": held}


def stored_as(model: nn.Module, tuned: Sequence[str]) -> str:
    """How the coarsest of the linears ``tuned`` is stored: "dense", "int8" or "four bits"."""
    kinds = [model.get_submodule(name) for name in tuned]
    packed = [module.storage for module in kinds if isinstance(module, QuantizedWeight)]
    return "four bits" if any(isinstance(s, FourBit) for s in packed) else "int8" if packed else "dense"


def _packed(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), QuantizedWeight)


def _spread(names: list[str], count: int) -> list[str]:
    return names[:: -(-len(names) // count)] if names else []


def _note(held: dict[str, str], key: str, weight: Tensor) -> None:
    if weight.device.type != "meta" and not is_sharded(weight) and weight.numel():
        held[key] = mark(weight)


@torch.no_grad()
def mark(weight: Tensor) -> str:
    """What is noted of ``weight``."""
    flat = weight.detach().reshape(-1)
    rms = _evenly(flat, _FOR_RMS).float().square().mean().sqrt()
    values = torch.cat([rms.reshape(1), _evenly(flat, _VALUES).float()]).to("cpu", torch.bfloat16)
    return f"{flat.numel()}:{base64.b64encode(values.view(torch.uint8).numpy().tobytes()).decode()}"


def _evenly(flat: Tensor, count: int) -> Tensor:
    step = max(1, flat.numel() // count)
    return flat[: step * count : step]


def _read(noted: str) -> tuple[str, Tensor]:
    size, _, code = noted.partition(":")
    values = torch.frombuffer(bytearray(base64.b64decode(code)), dtype=torch.bfloat16)
    return size, values.float()


def distance(wanted: str, here: str) -> float | None:
    """Root mean square of the difference of two marks, over that of the weight; None for weights of unlike size."""
    (size, one), (other_size, other) = _read(wanted), _read(here)
    if size != other_size or one.shape != other.shape:
        return None
    scale = torch.maximum(one[0], other[0]).clamp_min(1e-12)
    return float((one[1:] - other[1:]).square().mean().sqrt() / scale)


def distances(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, float]:
    """How far each weight noted in both is off, by key."""
    marks, ours = recorded.get("marks", {}), here.get("marks", {})
    found = {key: distance(noted, ours[key]) for key, noted in marks.items() if key in ours}
    return {key: value for key, value in found.items() if value is not None}


def allowed(*stored: str) -> float:
    """What the ways two bases are stored explain of their difference."""
    return sum(_ROUNDING[how] for how in stored)


def warn_if_off(off: Mapping[str, float], tuned: Collection[str], *stored: str, what: str = "this base") -> None:
    """Say how far the base is from the one an adapter was trained on, if rounding does not explain it.

    Args:
        off: :func:`distances`. tuned: the linears with deltas, which are ``stored`` so in the two bases.
    """
    bound = {key: allowed(*stored) if key.removesuffix(".weight") in tuned else allowed("dense") for key in off}
    shares = [value / bound[key] for key, value in off.items()]
    if not all(share <= 2 for share in shares) or not sum(share**2 for share in shares) <= len(shares):
        worst = max(off, key=lambda key: off[key] / bound[key])
        size = (sum(value**2 for value in off.values()) / len(off)) ** 0.5
        warnings.warn(
            f"{what} is not quite what the adapter was trained on: its weights are off by {size:.1%} of their size, "
            f"{worst} by {off[worst]:.1%}, where rounding explains {bound[worst]:.1%}; load the base of the training, "
            "or expect other outputs",
            stacklevel=4,
        )
