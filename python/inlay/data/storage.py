"""Samples on disk: data sets larger than memory, with random access, exact lengths and exact resume.

A folder holds tokens.bin and labels.bin (int32, all samples one after the other), offsets.bin (int64, where each
sample begins, and the end of the last) and, once all is written, made_from.json: what was encoded how, so that the same
run, resumed or in another process, takes the samples as they are. Reading maps the files; a sample is copied when it is
asked for.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FILES = ("tokens.bin", "labels.bin", "offsets.bin")
MADE_FROM = "made_from.json"
_KEYS = ("input_ids", "labels")


class SampleWriter:
    """Appends samples to the files of a folder; use as a context manager.

    Raises:
        FileExistsError: the folder holds samples already.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        held = [name for name in FILES if (self.folder / name).exists()]
        if held:
            raise FileExistsError(f"wanted an empty folder for encoded samples, got {self.folder} with {held[0]}")
        self._end = 0

    def __enter__(self) -> SampleWriter:
        self._files: list[BinaryIO] = [(self.folder / name).open("wb") for name in FILES]
        self._append(2, "q", [0])
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self._files:
            file.close()

    def append(self, sample: dict[str, list[int]]) -> None:
        for place, key in enumerate(_KEYS):
            self._append(place, "i", sample[key])
        self._end += len(sample["input_ids"])
        self._append(2, "q", [self._end])

    def _append(self, place: int, code: str, values: Sequence[int]) -> None:
        self._files[place].write(array(code, values).tobytes())


def read_made_from(folder: str | Path) -> dict[str, Any] | None:
    """What :func:`write_made_from` wrote, None if the folder was never finished."""
    path = Path(folder) / MADE_FROM
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_made_from(folder: str | Path, values: dict[str, Any]) -> None:
    """Declare the folder complete."""
    (Path(folder) / MADE_FROM).write_text(json.dumps(values, indent=2), encoding="utf-8")


class DiskSamples(Sequence[dict[str, list[int]]]):
    """The samples in a folder, read as they are asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._offsets = np.fromfile(self.folder / "offsets.bin", dtype=np.int64)
        self._columns = [self._map(name) for name in FILES[:2]]

    def _map(self, name: str) -> Any:
        path, total = self.folder / name, int(self._offsets[-1])
        if path.stat().st_size != 4 * total:
            raise ValueError(f"wanted {4 * total} bytes in {path}, got {path.stat().st_size}; encode the data again")
        return np.memmap(path, dtype=np.int32, mode="r") if total else np.zeros(0, dtype=np.int32)

    @property
    def lengths(self) -> list[int]:
        return np.diff(self._offsets).tolist()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        begin, end = self._offsets[index % len(self)], self._offsets[index % len(self) + 1]
        return {key: column[begin:end].tolist() for key, column in zip(_KEYS, self._columns, strict=True)}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(len(self)))
