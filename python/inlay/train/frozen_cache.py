"""``cache_frozen``: what enters the first trained block is kept on disk, and later epochs start there.

One file holds the states of every token of every training sample, in the order of the data, mapped into memory; one
byte a sample says which are there. A key over the data and the frozen weights says what they were computed from: a run
that finds another one begins anew, and one that goes on takes what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import TrainingData
from ..data.room import plain_tokens
from ..nn.replay import Replay, check_replays, frozen_blocks, replayable
from ..schedules import active_schedules

#: Underscores in front: what begins with one is not uploaded with an output_dir (push_to_hub).
STATES, KNOWN, KEY = "_frozen_states.bin", "_frozen_states_known.bin", "_frozen_states.json"


class FrozenCache:
    """The states of one training set at the boundary of one model.

    Args:
        folder: where the files are, or will be.
        lengths: tokens of every sample. like: some states, ``[..., H]``, of the dtype that training has.
        key: what they depend on.
    """

    def __init__(self, folder: str | Path, lengths: list[int], like: Tensor, key: str) -> None:
        self.folder, self.width, self.dtype = Path(folder), like.shape[-1], like.dtype
        self.begins = [0, *accumulate(lengths)]
        self.replayed = 0  # samples whose frozen blocks did not run
        self.folder.mkdir(parents=True, exist_ok=True)
        made_from = {"key": key, "samples": len(lengths), "tokens": self.begins[-1], "width": self.width}
        made_from["dtype"] = str(self.dtype)
        sizes = {STATES: self.begins[-1] * self.width * like.element_size(), KNOWN: len(lengths)}
        if self._held() != made_from or any(self._size(name) != size for name, size in sizes.items()):
            for name in (STATES, KNOWN, KEY):
                (self.folder / name).unlink(missing_ok=True)
            self._write(made_from)
        self.states = self._mapped(STATES, self.begins[-1] * self.width, self.dtype).view(-1, self.width)
        self.known = self._mapped(KNOWN, len(lengths), torch.uint8)

    @property
    def bytes(self) -> int:
        """Of the states on disk."""
        return self.states.numel() * self.states.element_size()

    def _held(self) -> Any:
        path = self.folder / KEY
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _size(self, name: str) -> int | None:
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def _write(self, made_from: dict[str, Any]) -> None:
        (self.folder / KEY).write_text(json.dumps(made_from) + "\n", encoding="utf-8")

    def _mapped(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """The file as a tensor that writes to it; a new one reads as zeros, and takes no room on disk yet."""
        return torch.from_file(str(self.folder / name), shared=True, size=size, dtype=dtype)

    @contextmanager
    def step(self, replay: Replay, samples: Tensor, real: Tensor) -> Iterator[None]:
        """Around a forward of ``samples [B]``, whose tokens stand where ``real [B, T]`` is: from the file if all of
        them are in it, else whole and into the file."""
        numbers = samples.tolist()
        if all(self.known[number] for number in numbers):
            self.replayed += len(numbers)
            replay.held = lambda hidden: _placed(self._read(numbers), hidden, real)
        try:
            yield
            if replay.held is None and replay.seen is not None:
                self._store(numbers, _taken(replay.seen, real))
        finally:
            replay.held = replay.seen = None

    def _read(self, numbers: list[int]) -> Tensor:
        return torch.cat([self.states[self.begins[number] : self.begins[number + 1]] for number in numbers])

    def _store(self, numbers: list[int], states: Tensor) -> None:
        start = 0
        for number in numbers:
            begin, end = self.begins[number], self.begins[number + 1]
            self.states[begin:end] = states[start : start + end - begin]
            start += end - begin
            self.known[number] = 1


def _taken(hidden: Tensor, real: Tensor) -> Tensor:
    """States ``[N, H]`` of the real tokens in ``hidden``, a padded batch ``[B, T, H]`` or a row ``[1, N', H]``."""
    states = hidden[real] if hidden.shape[:2] == real.shape else hidden[0, : int(real.sum())]
    return states.cpu()


def _placed(states: Tensor, hidden: Tensor, real: Tensor) -> Tensor:
    """``states [N, H]`` where the real tokens stand in a tensor like ``hidden``; zero elsewhere, which nobody sees."""
    states = states.to(hidden.device)
    placed = torch.zeros_like(hidden)
    if hidden.shape[:2] == real.shape:
        placed[real] = states
    else:
        placed[0, : states.shape[0]] = states
    return placed


def check_cacheable(model: nn.Module, arguments: Any, data: TrainingData) -> Tensor:
    """Some states at the boundary of ``model``.

    Raises:
        ValueError: naming what makes states differ from epoch to epoch, or who could not read them.
    """
    asked = {
        "packing": data.packed,
        "several processes": arguments.world_size > 1,
        "bf16 or fp16 (autocast)": arguments.bf16 or arguments.fp16,
        "torch_compile": arguments.torch_compile,
        "neftune_noise_alpha, which draws random numbers": arguments.neftune_noise_alpha is not None,
        "a schedule, which changes what trains": bool(active_schedules(model)),
    }
    found = next((what for what, is_on in asked.items() if is_on), None)
    if found is not None:
        raise ValueError(f"cache_frozen=True does not go with {found}; leave one of them out")
    ids = plain_tokens(model, (1, 6), torch.Generator().manual_seed(0)).to(next(model.parameters()).device)
    try:
        return check_replays(model, ids)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cache_frozen=True: {error}") from error


def fingerprint_of(model: nn.Module, data: TrainingData, like: Tensor) -> str:
    """SHA-256 over the samples, every frozen tensor that states at the boundary could depend on, and some states, which
    show how they are computed: in 8 bits, with what epsilon, under which adapter."""
    digest = hashlib.sha256(data.sha256().encode())
    digest.update(like.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    above = _names_from(model, frozen_blocks(model)[1])
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers()), key=lambda item: item[0]):
        if not name.startswith(above) and not tensor.requires_grad:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _names_from(model: nn.Module, first: nn.Module) -> tuple[str, ...]:
    """How the names of ``first`` and of the blocks after it begin."""
    name = next(name for name, module in model.named_modules() if module is first)
    stack, _, place = name.rpartition(".")
    held: Any = model.get_submodule(stack)
    return tuple(f"{stack}.{index}." for index in range(int(place), len(held)))


@contextmanager
def caching(trainer: Any, folder: str | Path, like: Tensor) -> Iterator[FrozenCache]:
    """Within this context ``trainer`` runs frozen blocks once a sample."""
    data = trainer.train_dataset
    cache = FrozenCache(folder, data.lengths, like, fingerprint_of(trainer.model, data, like))
    count, known = len(frozen_blocks(trainer.model)[0]), int(cache.known.sum())
    print(
        f"inlay: cache_frozen: states above {count} frozen blocks, {cache.bytes / 2**20:,.1f} MiB in {cache.folder}"
        + (f", {known} of {len(data)} samples there already" if known else "")
    )
    with replayable(trainer.model) as replay:
        trainer.frozen = (cache, replay)
        try:
            yield cache
        finally:
            trainer.frozen = None
    print(f"inlay: cache_frozen: frozen blocks were left out for {cache.replayed:,} samples of all epochs")
