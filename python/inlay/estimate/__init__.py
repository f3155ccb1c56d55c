"""``estimate``: memory and work of a training step before it is run, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import BaseConfig
from ..methods import Method
from ..model import require_state
from ..nn.partial import block_stacks
from .report import Estimate
from .scale import PerGPU, per_gpu
from .shapes import fused_attention, meta_model, text_batch, tune_without_data
from .tracker import Tracker

__all__ = ["Estimate", "PerGPU", "estimate", "per_gpu"]

#: Bytes of optimizer state per byte of an fp32 parameter.
OPTIMIZERS = {"adamw": 2, "adamw_torch": 2, "adamw_torch_fused": 2, "sgd_momentum": 1, "adafactor": 0, "sgd": 0}

#: What a process takes besides tensors, low, expected and high, in bytes by device.
RUNTIME = {"cpu": (0, 64 << 20, 128 << 20), "cuda": (0, 32 << 20, 64 << 20)}


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
        NotImplementedError: the model's step depends on values of its activations.
    """
    _check(optimizer, device)
    shapes = meta_model(model, dtype)
    shapes = tune_without_data(shapes, method, base).train()
    if gradient_checkpointing:
        shapes.config.use_cache = False
        shapes.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = text_batch(shapes, batch, seq) if isinstance(batch, int) else _on_meta(batch)
    tracker = _run(shapes, inputs, device)
    trainable = _bytes(p for p in shapes.parameters() if p.requires_grad)
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
        optimizer_state=OPTIMIZERS[optimizer] * trainable,
        gradients=trainable,
        kept=dict(tracker.kept),
        at_peak={kind: size for kind, size in tracker.at_peak.items() if size},
        runtime=RUNTIME[device],
        flops=dict(tracker.flops),
        adapter=_adapter_bytes(shapes),
        tokens=next(iter(inputs.values())).shape[:2].numel(),
        units=_units(shapes),
    )


def _check(optimizer: str, device: str) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: wanted one of {sorted(OPTIMIZERS)}, got {optimizer!r}")
    if device not in RUNTIME:
        raise ValueError(f"device: wanted one of {sorted(RUNTIME)}, got {device!r}")


def _on_meta(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to("meta") for key, value in batch.items()}


def _run(model: nn.Module, batch: dict[str, Tensor], device: str) -> Tracker:
    tracker = Tracker(model)
    try:
        with fused_attention(device):
            tracker.step(model, batch)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{type(model).__name__}: its step depends on values of its activations, which shapes cannot tell "
            f"({error}); measure a step instead"
        ) from error
    return tracker


def _bytes(tensors: Any) -> int:
    """Each storage once: weights may be tied."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _units(model: nn.Module) -> dict[str, int]:
    """Frozen bytes by what shards them: blocks, and everything else."""
    blocks = [_bytes(_frozen(block)) for stack in block_stacks(model).values() for block in stack]
    total = _bytes((*_frozen(model), *model.buffers()))
    return {"blocks": sum(blocks), "largest": max(blocks, default=0), "rest": total - sum(blocks)}


def _frozen(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if not p.requires_grad]


def _adapter_bytes(model: nn.Module) -> int:
    """What ``adapter_model.safetensors`` takes: the tensors, and about 100 bytes of header for each."""
    from ..adapters.save import collect

    tensors, _ = collect(model, require_state(model, "estimate").active[0])
    return sum(t.numel() * t.element_size() + len(key) + 70 for key, t in tensors.items())
