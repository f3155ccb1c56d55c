"""Several processes that train one adapter must have chosen the same channels of the same base."""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..sharding import whole
from ..state import require_state


def check_processes_agree(model: nn.Module) -> None:
    """Compare what is not sent around: pieces' buffers (indices), what trains, a few base weights; in every process.

    DDP adds up gradients by position; where processes trained different channels the sum would mean nothing.

    Raises:
        ValueError: in every process, if two of them differ.
    """
    state = require_state(model, "check_processes_agree")
    held = zlib.crc32(json.dumps(state.base_sample, sort_keys=True).encode())
    for name, buffer in model.named_buffers():
        if ".deltas." in name:
            held = zlib.crc32(whole(buffer).cpu().contiguous().view(-1).view(torch.uint8).numpy(), held)
    for name, parameter in model.named_parameters():
        held = zlib.crc32(f"{name} {parameter.requires_grad}".encode(), held)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, held)
    if len(set(everyone)) > 1:
        raise ValueError(
            f"wanted the same base and the same trained channels in all {len(everyone)} processes, got "
            f"{len(set(everyone))} different ones; pass the same seed and the same calibration data to inlay.tune "
            "everywhere, or inlay.load one adapter"
        )
