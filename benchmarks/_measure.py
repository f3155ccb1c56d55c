"""Memory, kept bytes and provenance, measured one way everywhere."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory can be measured on Linux only")


def reset_peak(device: str) -> int:
    """Start measuring peak memory; returns what is in use now, in bytes.

    On a CPU the kernel's high-water mark is reset (writing 5 to clear_refs) after freed memory went back to it:
    loading a model leaves a mark hundreds of MB above the loaded model.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def now(device: str) -> float:
    """Seconds on a clock of no beginning, all that was asked of a GPU done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str) -> int:
    """Peak memory since :func:`reset_peak`, in bytes."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


@contextmanager
def kept_bytes(model: nn.Module) -> Iterator[dict[str, int]]:
    """Bytes autograd keeps for backward within the context, each storage once, weights and buffers not counted."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    held: list[Tensor] = []  # keeps storages alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())
        return tensor

    result: dict[str, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield result
    result["bytes"] = sum(seen.values())


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions and commit a result was made with."""
    versions = {}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "inlay"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    cpu = next((ln.split(":")[1].strip() for ln in _lines("/proc/cpuinfo") if ln.startswith("model name")), "")
    flags = next((ln.split(":")[1].split() for ln in _lines("/proc/cpuinfo") if ln.startswith("flags")), [])
    here = Path(__file__).parent
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _git(here, "rev-parse", "--short", "HEAD"),
        "dirty": bool(_git(here, "status", "--porcelain", "--untracked-files=no")),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "cpu": cpu or platform.processor(),
        "isa": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def describe(machine: dict[str, Any]) -> str:
    """One line on the machine of a result, for tables."""
    name = machine["gpu"] or f"{machine['cores']}-core {machine['cpu']} ({', '.join(machine['isa'])})"
    return f"{name}, torch {machine['versions']['torch']}, {machine['date']}, commit {machine['commit']}"


def _lines(path: str) -> list[str]:
    with suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


def _git(where: Path, *args: str) -> str:
    with suppress(OSError, subprocess.CalledProcessError):
        run = subprocess.run(["git", "-C", str(where), *args], check=True, capture_output=True, text=True)
        return run.stdout.strip()
    return ""
