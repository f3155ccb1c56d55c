"""``estimate``: memory and work of a training step before it is run, before any weight is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import BaseConfig, FourBit, QuantizedWeight
from ..methods import Method
from ..nn.attention import FusedAttention
from ..nn.blocks import FusedGatedMLP
from ..schedules import start
from ..sites import block_stacks
from ..state import require_state
from .report import Estimate
from .scale import PerGPU, per_gpu
from .shapes import fused_attention, meta_model, text_batch, tune_without_data
from .tracker import Tracker

__all__ = ["Estimate", "PerGPU", "estimate", "per_gpu"]

#: Bytes of optimizer state per 4 bytes, those of one fp32 element.
OPTIMIZERS = {
    "adamw": 2.0,
    "adamw_torch": 2.0,
    "adamw_torch_fused": 2.0,
    "adamw_8bit": 0.51,
    "sgd_momentum": 1.0,
    "sgd": 0.0,
}

#: What a process takes besides tensors: share of the counted bytes and bytes, low, expected and high, by device.
#: On a CPU that is the C library's heap, which keeps holes between tensors of unlike life, and code and workspaces of
#: oneDNN: fitted to S2FT and LoRA, dense and nf4, on SmolLM2-135M at 64 to 2,048 tokens (glibc, 1 and 2 threads), 14
#: runs, all within 10%; without the share every peak above 256 tokens came out 15 to 30% too low. On a GPU it is the
#: workspace of cuBLAS: torch's max_memory_allocated counts tensors, not holes.
RUNTIME = {
    "cpu": ((0.15, 16 << 20), (0.28, 26 << 20), (0.5, 64 << 20)),
    "cuda": ((0.0, 0), (0.0, 32 << 20), (0.05, 64 << 20)),
}


def estimate(
    model: Any,
    method: Method | None = None,
    *,
    base: str | BaseConfig | None = None,
    batch: int | Mapping[str, Tensor] = 1,
    seq: int = 1024,
    dtype: torch.dtype | None = None,
    optimizer: str = "adamw",
    gradient_checkpointing: bool = False,
    device: str = "cpu",
) -> Estimate:
    """Memory and FLOPs of one training step, without loading a weight.

    The model is built and tuned on the meta device by the code that tunes real ones, and one step is run there while
    every tensor is counted. Numbers therefore follow the model and the method, whatever they are.

    Args:
        model: a transformers config, the folder of one, or a module, plain or tuned, which is not changed.
        method: as for :func:`inlay.tune`; None for a tuned model. Selection needs no data here: it is random.
        base: quantize the linears first, as for :func:`inlay.tune`.
        batch: sequences per device; or the forward's arguments themselves, with labels, whose shapes are used.
        seq: tokens per sequence, all of them supervised.
        dtype: of the frozen weights and activations; a config's own if None.
        optimizer: "adamw", "sgd_momentum", "sgd", ...: what state it keeps per trainable parameter.
        gradient_checkpointing: run blocks again in the backward instead of keeping their activations.
        device: "cpu" or "cuda": whose attention kernels and library workspaces to count.

    Raises:
        TypeError: ``model`` is none of these. ValueError: an unknown option, or as :func:`inlay.tune`.
        NotImplementedError: the model's step depends on values of its activations, as some mixtures of experts do.
    """
    _check(optimizer, device)
    shapes = meta_model(model, dtype)
    shapes = tune_without_data(shapes, method, base).train()
    start(shapes)
    if gradient_checkpointing:
        _checkpoint(shapes)
    inputs = text_batch(shapes, batch, seq) if isinstance(batch, int) else _on_meta(batch)
    tracker = _run(shapes, inputs, device)
    at_peak = {kind: size for kind, size in tracker.at_peak.items() if size}
    if device == "cuda" and (panel := _largest_panel(shapes)):
        at_peak["dequantized weight"] = panel
    trained = [p for p in shapes.parameters() if p.requires_grad]
    trainable, state = _bytes(trained), _state_bytes(trained, optimizer)
    counted = trainable + state + sum(at_peak.values())
    config = BaseConfig.of(base).base if base is not None else None
    return Estimate(
        setting={
            "model": type(shapes).__name__,
            "method": next(iter(require_state(shapes, "estimate").methods.values())).peft_type,
            "base": config,
            **({"batch": batch, "seq": seq} if isinstance(batch, int) else {}),
            "optimizer": optimizer,
            "device": device,
            "gradient checkpointing": gradient_checkpointing,
        },
        weights=_bytes((*_frozen(shapes), *shapes.buffers())),
        trainable=trainable,
        optimizer_state=state,
        gradients=trainable,
        kept=dict(tracker.kept),
        at_peak=at_peak,
        runtime=tuple(int(share * counted) + fixed for share, fixed in RUNTIME[device]),
        flops=dict(tracker.flops),
        adapter=_adapter_bytes(shapes),
        tokens=_tokens(inputs),
        units=_units(shapes),
    )


def _state_bytes(trained: list[nn.Parameter], optimizer: str) -> int:
    """States are fp32; beside 16-bit parameters AdamW keeps what they have no room for, 2 bytes an element."""
    elements = sum(p.numel() for p in trained)
    residuals = sum(2 * p.numel() for p in trained if p.element_size() == 2) if optimizer.startswith("adamw") else 0
    return int(OPTIMIZERS[optimizer] * 4 * elements) + residuals


def _check(optimizer: str, device: str) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: wanted one of {sorted(OPTIMIZERS)}, got {optimizer!r}")
    if device not in RUNTIME:
        raise ValueError(f"device: wanted one of {sorted(RUNTIME)}, got {device!r}")


def _checkpoint(model: nn.Module) -> None:
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise ValueError(
            f"gradient_checkpointing: wanted a transformers model, which has it, got {type(model).__name__}"
        )
    model.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that every supported release has
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _largest_panel(model: nn.Module) -> int:
    """Bytes of the largest dequantized panel: on a GPU a whole weight, or the four-bit ones of one input below each
    other, in a workspace that stays."""
    groups = [[module] for module in model.modules() if isinstance(module, QuantizedWeight)]
    for block in model.modules():
        if isinstance(block, FusedAttention | FusedGatedMLP):
            linears = [getattr(block, name) for name in block.inlay_same_input]
            storages = [linear.storage for linear in linears if isinstance(linear, QuantizedWeight)]
            if len(storages) == len(linears) and FourBit.alike(storages):
                groups.append(linears)
    panels = [sum(m.storage.rows * m.storage.columns * m.compute_dtype.itemsize for m in group) for group in groups]
    return max(panels, default=0)


def _on_meta(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to("meta") for key, value in batch.items()}


def _run(model: nn.Module, batch: dict[str, Tensor], device: str) -> Tracker:
    tracker = Tracker(model)
    try:
        with fused_attention(device):
            tracker.step(model, batch)
    except (NotImplementedError, RuntimeError) as error:
        raise NotImplementedError(
            f"{type(model).__name__}: its step cannot be run on shapes alone, perhaps because it depends on values of "
            f"its activations ({error}); measure a step instead"
        ) from error
    return tracker


def _tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a text batch; samples of any other."""
    return batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values())))


def _bytes(tensors: Any) -> int:
    """Each storage once: weights may be tied."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _units(model: nn.Module) -> dict[str, int]:
    """Frozen bytes in blocks and outside them, and the largest block with its part of the adapter."""
    blocks = [block for stack in block_stacks(model).values() for block in stack]
    frozen = sum(_bytes(_frozen(block)) for block in blocks)
    total = _bytes((*_frozen(model), *model.buffers()))
    largest = max((_bytes(block.parameters()) for block in blocks), default=0)
    return {"blocks": frozen, "largest": largest, "rest": total - frozen}


def _frozen(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if not p.requires_grad]


def _adapter_bytes(model: nn.Module) -> int:
    """What ``adapter_model.safetensors`` takes: the tensors, and about 100 bytes of header for each."""
    from ..adapters.save import collect

    tensors, _ = collect(model, require_state(model, "estimate").active[0])
    return sum(t.numel() * t.element_size() + len(key) + 70 for key, t in tensors.items())
