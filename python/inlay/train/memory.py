"""Peak memory above a starting point, measured one way everywhere in inlay."""

from __future__ import annotations

import contextlib
import ctypes
import gc

import torch


class PeakMemory:
    """Bytes at the highest point since construction, above what was in use then.

    On CUDA the allocator knows. On Linux the kernel keeps a high-water mark of resident memory,
    which must be reset first: loading a model leaves it hundreds of MB above the loaded model,
    which is also why `ru_maxrss`, which cannot be reset, is of no use here.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start: int | None = torch.cuda.memory_allocated(self.device)
        else:
            return_free_memory()
            self._start = _status("VmRSS") if _reset_high_water_mark() else None

    def bytes(self) -> int | None:
        """None where the system offers no high-water mark that can be reset."""
        if self._start is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._start
        peak = _status("VmHWM")
        return None if peak is None else peak - self._start


def return_free_memory() -> None:
    """Give freed pages that glibc's heap still holds back to the system; elsewhere nothing.

    They would hide the first allocations of what is measured. And tensors of other sizes than before do not fit into
    the holes that those left: a run of batches of many shapes would hold the holes of all of them.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as control:
            control.write("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            for line in status:
                if line.startswith(f"{key}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
