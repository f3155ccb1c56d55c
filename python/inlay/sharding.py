"""Tensors that several processes hold parts of: what FSDP2 makes of parameters."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """True for a DTensor, which is this process's part of a tensor."""
    # Not imported for the question's sake: without the module there are no such tensors, and it takes half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """This process's part of ``tensor``, which shares its memory; a plain tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def first_element(tensor: Any) -> int:
    """Where this process's part of ``tensor`` begins, in elements counted row by row; 0 for a plain tensor.

    Raises:
        TypeError: a part that is not a run of whole rows.
    """
    if not is_sharded(tensor) or tensor.dim() == 0:
        return 0
    from torch.distributed.tensor import Shard

    mesh, first, rows = tensor.device_mesh, 0, tensor.shape[0]
    for size, place, coordinate in zip(mesh.shape, tensor.placements, mesh.get_coordinate(), strict=True):
        if place.is_replicate():
            continue
        if type(place) is not Shard or place.dim != 0:
            raise TypeError(f"wanted a tensor that is sharded by rows, got {place}; shard it along dimension 0")
        share = -(-rows // size)  # as torch.chunk cuts them, and one after the other
        first, rows = first + min(rows, share * coordinate), max(0, min(share, rows - share * coordinate))
    return first * (tensor.numel() // max(1, tensor.shape[0]))


def whole(tensor: Any) -> Tensor:
    """All of ``tensor``, gathered if it is sharded: then every process must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def any_sharded(module: nn.Module) -> bool:
    """True if a parameter of ``module`` is sharded."""
    return any(is_sharded(parameter) for parameter in module.parameters())


def from_first(tensor: Tensor) -> None:
    """Give every process of a group what the first has in ``tensor``, which is on all of them; nothing without a group.
    All processes must call."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
        distributed.broadcast(sent, src=0)
        tensor.copy_(sent)


def writes_here() -> bool:
    """True in the one process of a group that should write files; True without a group."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
