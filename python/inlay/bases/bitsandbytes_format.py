"""bitsandbytes' state-dict tensors of one linear, to and from our storages. bitsandbytes itself is not needed.

4 bits   weight                                        packed uint8 [ceil(N/2), 1]; other dtypes are views of bytes
         weight.absmax                                 fp32 [blocks], or uint8 codes when doubly quantized
         weight.quant_map                              fp32 [16], the levels
         weight.nested_absmax, weight.nested_quant_map fp32 [ceil(blocks/256)] and [256], when doubly quantized
         weight.quant_state.bitsandbytes__nf4 (fp4)    uint8: a JSON object with blocksize, dtype, shape, nested_offset
int8     weight, SCB, weight_format                    int8 [out, in]; fp32 [out]; uint8 [], 0 for row-major
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.quantize_blockwise import NESTED_BLOCKSIZE, QUANT_TYPES, dynamic_map, levels
from .four_bit import FourBit
from .int8 import Int8
from .quantized import QuantizedLinear, Storage

STATE_PREFIX = "weight.quant_state.bitsandbytes__"

#: Every key of a quantized linear, after its name.
KEYS = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *(STATE_PREFIX + quant_type for quant_type in QUANT_TYPES),
    "SCB",
    "weight_format",
)
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_STATE_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")


def is_quantized(keys: Any) -> bool:
    """Whether the keys of a linear (after its name) say that it is, or should have been, quantized."""
    return any(key in keys for key in KEYS[1:])


def missing_keys(keys: Any) -> list[str]:
    """What a quantized linear with these keys (after its name) lacks."""
    if "SCB" in keys or "weight_format" in keys:
        return [key for key in ("weight", "SCB") if key not in keys]
    wanted = ["weight", "weight.absmax", "weight.quant_map"]
    if any(key in keys for key in _NESTED):
        wanted += _NESTED
    missing = [key for key in wanted if key not in keys]
    has_state = any(STATE_PREFIX + quant_type in keys for quant_type in QUANT_TYPES)
    return missing if has_state else [*missing, f"{STATE_PREFIX}<{' or '.join(QUANT_TYPES)}>"]


def to_bitsandbytes(storage: Storage, tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state-dict tensors of one quantized weight, by key after the linear's name.

    Args:
        tensors: as ``storage.quantize`` returns them. dtype: of the dense weight.
    """
    if isinstance(storage, Int8):
        codes, absmax = tensors
        return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    if not isinstance(storage, FourBit):
        raise ValueError(f"wanted a four-bit or int8 base, got {storage}, which bitsandbytes has no format for")
    packed, absmax, codes, offset = tensors
    assert packed is not None and absmax is not None and (codes is None) == (offset is None)
    state: dict[str, Any] = {
        "quant_type": storage.quant_type,
        "blocksize": storage.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [storage.rows, storage.columns],
    }
    held = {
        "weight": packed.reshape(-1, 1),
        "weight.absmax": absmax if codes is None else codes,
        "weight.quant_map": levels(storage.quant_type).to(packed.device, copy=True),
    }
    if offset is not None:
        held["weight.nested_absmax"] = absmax
        held["weight.nested_quant_map"] = dynamic_map().to(packed.device, copy=True)
        state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": float(offset)}
    text = json.dumps(state).encode()
    held[STATE_PREFIX + storage.quant_type] = torch.tensor(list(text), dtype=torch.uint8, device=packed.device)
    return held


def from_bitsandbytes(
    held: Mapping[str, Tensor], where: str
) -> tuple[Storage, tuple[Tensor | None, ...], torch.dtype | None]:
    """Storage, its tensors, and the dtype of the dense weight (None for int8, which does not record it).

    Args:
        held: tensors by key after the linear's name. where: the linear's name, for errors.

    Raises:
        ValueError: a key is missing, a size does not fit, or the format is not one of the above.
    """
    missing = missing_keys(held)
    if missing:
        raise ValueError(
            f"{where}: wanted the tensors of a bitsandbytes weight, got {sorted(held)} without {missing}; "
            "the checkpoint is incomplete: download or save it again"
        )
    return _int8(held, where) if "SCB" in held else _four_bit(held, where)


def _int8(held: Mapping[str, Tensor], where: str) -> tuple[Storage, tuple[Tensor, Tensor], None]:
    codes, absmax = held["weight"], held["SCB"].reshape(-1)
    layout = int(held["weight_format"]) if "weight_format" in held else 0
    if layout != 0:
        raise ValueError(
            f"{where}.weight_format: wanted 0 (row-major), got {layout}; save it with a newer bitsandbytes"
        )
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"{where}.weight: wanted int8 [out, in], got {codes.dtype} {tuple(codes.shape)}")
    if absmax.dtype != torch.float32 or absmax.numel() != codes.shape[0]:
        got = f"{absmax.dtype} {tuple(held['SCB'].shape)}"
        raise ValueError(f"{where}.SCB: wanted float32 [{codes.shape[0]}], one scale per row, got {got}")
    return Int8(*codes.shape), (codes, absmax), None


def _four_bit(held: Mapping[str, Tensor], where: str) -> tuple[Storage, tuple[Tensor | None, ...], torch.dtype]:
    state = _state(held, where)
    nested = _NESTED[0] in held
    missing = [key for key in (*_STATE_FIELDS, *(_NESTED_FIELDS if nested else ())) if key not in state]
    if missing:
        raise ValueError(f"{where}: the quant_state lacks {missing}, it has {sorted(state)}; the checkpoint is broken")
    shape, dtype = state["shape"], getattr(torch, str(state["dtype"]), None)
    if not isinstance(shape, list) or len(shape) != 2 or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{where}: wanted the shape and dtype of a weight, got {shape} and {state['dtype']!r}")
    if nested and state["nested_blocksize"] != NESTED_BLOCKSIZE:
        got = state["nested_blocksize"]
        raise ValueError(f"{where}: wanted scales in blocks of {NESTED_BLOCKSIZE}, got blocks of {got}")
    _check_map(held["weight.quant_map"], levels(state["quant_type"]), f"{where}.weight.quant_map")
    packed = held["weight"].contiguous().view(torch.uint8).reshape(-1)
    absmax, codes, offset = held["weight.absmax"].reshape(-1), None, None
    if nested:
        _check_map(held["weight.nested_quant_map"], dynamic_map(), f"{where}.weight.nested_quant_map")
        codes, absmax = absmax, held["weight.nested_absmax"].reshape(-1)
        offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32, device=packed.device)
    try:
        storage = FourBit(shape[0], shape[1], state["quant_type"], state["blocksize"], nested)
        storage.check(packed, absmax, codes, offset)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return storage, (packed, absmax, codes, offset), dtype


def _state(held: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The JSON object among the tensors."""
    key = next(STATE_PREFIX + quant_type for quant_type in QUANT_TYPES if STATE_PREFIX + quant_type in held)
    try:
        state = json.loads(bytes(held[key].cpu().tolist()).decode())
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{where}.{key} is no JSON ({error}); the checkpoint is broken") from None
    if not isinstance(state, dict) or state.get("quant_type") != key.removeprefix(STATE_PREFIX):
        raise ValueError(f"{where}.{key}: wanted a JSON object with that quant_type, got {state}")
    return state


def _check_map(got: Tensor, wanted: Tensor, where: str) -> None:
    """Another codebook would decode to other weights."""
    if got.numel() != wanted.numel() or not torch.allclose(got.float().cpu().reshape(-1), wanted, rtol=0, atol=1e-6):
        raise ValueError(
            f"{where}: wanted this format's {wanted.numel()} levels, got others; nothing here decodes them"
        )


# --- modules ----------------------------------------------------------------------------------------------------------


def is_bitsandbytes(module: nn.Module) -> bool:
    """True for a linear of the bitsandbytes library, which need not be importable."""
    return any(
        cls.__module__.partition(".")[0] == "bitsandbytes" and cls.__name__ in ("Linear4bit", "Linear8bitLt")
        for cls in type(module).__mro__
    )


def convert_module(module: nn.Module, where: str) -> QuantizedLinear:
    """A ``Linear4bit`` or ``Linear8bitLt`` as ours, sharing its bytes.

    Raises:
        ValueError: it is not quantized yet, or bitsandbytes has repacked it for inference.
    """
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            f"{where}: bitsandbytes has repacked this weight for inference on a CPU, which rounds its scales; "
            "load the model again and tune it before it is run in eval mode"
        )
    held = {key: value.data for key, value in module.state_dict().items() if key != "bias"}
    if not is_quantized(held):
        raise ValueError(f"{where}: this {type(module).__name__} holds no quantized weight yet; move it to its device")
    storage, tensors, dtype = from_bitsandbytes(held, where)
    compute = getattr(module, "compute_dtype", None) or dtype
    if compute is None:
        compute = module.bias.dtype if module.bias is not None else torch.get_default_dtype()
    conv1d = getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"  # as transformers notes it
    return QuantizedLinear(storage, tensors, module.bias, compute, conv1d).train(module.training)


def convert_model(model: nn.Module) -> int:
    """Replace the bitsandbytes linears of ``model`` by ours, in place; how many."""
    found = {name: module for name, module in model.named_modules() if is_bitsandbytes(module)}
    converted = {name: convert_module(module, name) for name, module in found.items()}  # before anything changes
    for name, module in converted.items():
        model.set_submodule(name, module)
    return len(converted)
