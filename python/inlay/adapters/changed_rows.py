"""Tensors trained whole, stored as the rows that training changed: ``save_pretrained(..., delta=True)``.

A row is an index of the first dimension: a token of an embedding, an expert of a mixture. Rows are stored as they are,
not as differences: ``w - w0`` rounded to 16 bits does not give ``w`` back, and in 32 takes twice the bytes. What is
not stored is the base's, and a digest of it is there: a file gives the trained bits or an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.whole import TrainsWhole
from ..nn.whole import WholeTensor, owners
from ..state import require_state
from .files import KEY_PREFIX

#: What stands behind a tensor's key in the file: the numbers of its rows, and the rows.
ROWS, VALUES = "changed_rows", "changed_values"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Bytes that are hashed at a time.
_PIECE = 2**26


@dataclass(frozen=True)
class ChangedRows:
    """``values [k, ...]`` at ``rows [k]``, sorted int64, of a tensor of ``shape``; else the base's, of ``digest``."""

    key: str
    rows: Tensor
    values: Tensor
    shape: tuple[int, ...]
    digest: str

    def onto(self, base: Tensor) -> Tensor:
        """The trained tensor on ``base``, in the dtype it was trained in.

        Raises:
            ValueError: ``base`` is not, bit for bit, what the rows that are not stored were.
        """
        if tuple(base.shape) != self.shape:
            raise ValueError(
                f"{self.key}: wanted shape {self.shape}, got {tuple(base.shape)}; load the adapter on a model with as "
                "many labels (num_labels) or tokens as it was trained with"
            )
        full = base.detach().to(self.values.dtype, copy=True)
        if self.digest != digest_of(full, self.rows):
            raise ValueError(
                f"{self.key}: the adapter was saved with delta=True, which stores the rows that training changed, and "
                f"the others are not those of the base it was trained on, in {self.values.dtype}: load that very "
                "checkpoint, dense, or save the adapter without delta"
            )
        full[self.rows.to(full.device)] = self.values.to(full.device)
        return full

    def tensors(self) -> dict[str, Tensor]:
        """What the adapter file holds."""
        prefix = f"{KEY_PREFIX}{self.key}"
        return {f"{prefix}.{ROWS}": self.rows, f"{prefix}.{VALUES}": self.values}


def digest_of(tensor: Tensor, rows: Tensor) -> str:
    """SHA-256 of all rows of ``tensor`` but ``rows``, in its dtype."""
    kept = torch.ones(tensor.shape[0], dtype=torch.bool)
    kept[rows.cpu()] = False
    places, found = kept.nonzero().flatten(), hashlib.sha256()
    at_once = max(1, _PIECE // max(1, tensor[:1].nbytes))
    for part in places.split(at_once):
        piece = tensor.detach().index_select(0, part.to(tensor.device)).cpu().contiguous()
        found.update(piece.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def changed_rows(key: str, value: Tensor, original: Tensor) -> ChangedRows | None:
    """The rows of ``value`` whose bits are not ``original``'s; None where storing them would save nothing."""
    base = original.detach().to(value.device, value.dtype)
    integer = _INTEGERS[value.element_size()]
    different = (value.detach().contiguous().view(integer) != base.contiguous().view(integer)).reshape(len(value), -1)
    rows = different.any(1).nonzero().flatten().cpu()
    if rows.numel() * (8 + value[:1].nbytes) >= value.nbytes:
        return None
    values = value.detach().index_select(0, rows.to(value.device)).cpu()
    return ChangedRows(key, rows, values, tuple(value.shape), digest_of(base, rows))


def split_changed(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put changed rows in the place of whole tensors of adapter ``name`` in an adapter file's ``tensors``; returns what
    its config says of them.

    Raises:
        ValueError: the adapter is of a method that other libraries read, or the base's own values are gone.
    """
    _check_has_originals(model, name)
    said, seen = {}, set()
    for key, _, _, held in owners(model):
        stored = f"{KEY_PREFIX}{key}"
        if name not in held.copies or stored not in tensors or key in seen or not tensors[stored].dim():
            continue
        seen.add(key)
        found = changed_rows(key, tensors[stored], held.original)
        if found is not None:
            del tensors[stored]
            tensors |= found.tensors()
            said[key] = {"shape": list(found.shape), "sha256": found.digest}
    return said


def _check_has_originals(model: nn.Module, name: str) -> None:
    method = require_state(model, "save_pretrained").methods[name]
    if not isinstance(method, TrainsWhole):
        raise ValueError(
            "delta=True: wanted a method that trains the model's own tensors whole, got "
            f"{type(method).__name__}, whose files hold changes alone already; leave delta out"
        )
    gone = [key for key, _, _, held in owners(model) if held.overwritten == name]
    if gone:
        raise ValueError(
            f"delta=True: the base's own {gone[0]} is gone (keep_original=False), so that nobody knows what changed; "
            "tune with keep_original=True, or save without delta"
        )


def take_changed(tensors: dict[str, Tensor], config: Mapping[str, Any], where: Path) -> dict[str, ChangedRows]:
    """Remove from an adapter file's ``tensors`` what ``delta=True`` stored, by state-dict key."""
    found = {}
    for key, said in ((config.get("inlay") or {}).get("delta") or {}).items():
        rows, values = (tensors.pop(f"{KEY_PREFIX}{key}.{leaf}", None) for leaf in (ROWS, VALUES))
        if rows is None or values is None:
            raise ValueError(f"{where}: wanted {KEY_PREFIX}{key}.{ROWS} and .{VALUES}; the file is incomplete")
        shape = tuple(said["shape"])
        fits = rows.dtype == torch.int64 and rows.dim() == 1 and values.shape == (rows.numel(), *shape[1:])
        if not fits or (rows.numel() and not _ascending(rows, shape[0])):
            raise ValueError(
                f"{where}: {key}: wanted ascending row numbers below {shape[0]} and as many rows, got {rows.dtype} "
                f"{tuple(rows.shape)} and {tuple(values.shape)}; the file is corrupt: save the adapter again"
            )
        found[key] = ChangedRows(key, rows, values, shape, said["sha256"])
    return found


def _ascending(rows: Tensor, count: int) -> bool:
    return int(rows[0]) >= 0 and int(rows[-1]) < count and bool((rows[1:] > rows[:-1]).all())


def put_on(model: nn.Module, changed: Mapping[str, ChangedRows]) -> dict[str, Tensor]:
    """The trained tensors of ``changed`` on the base's own of ``model``; ValueError if those are others, or gone."""
    held: dict[str, WholeTensor] = {key: record for key, _, _, record in owners(model)}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    found = {}
    for key, rows in changed.items():
        base = tensors.get(key)
        if key in held and held[key].overwritten is not None:
            raise ValueError(f"{key}: the base's own values are gone: adapter {held[key].overwritten!r} trains them")
        if key in held and held[key].active is not None:
            base = held[key].original
        if base is None:
            raise ValueError(f"the adapter holds {key!r}, which this {type(model).__name__} lacks; load its own base")
        found[key] = rows.onto(base)
    return found
