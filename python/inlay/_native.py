"""The compiled engine `inlay._C`, if it was built: loading it, its thread count, its OpenMP runtime.

torch is imported first on purpose: its wheel brings libgomp, and an extension loaded afterwards shares
that one runtime. The other order can put two OpenMP runtimes, hence two thread pools, in one process.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from types import ModuleType

import torch

_C: ModuleType | None
missing_reason: str | None = None  # why `_C` is None, in words for an error message

try:
    _loaded = importlib.import_module("inlay._C")
    _loaded.init_dtypes({getattr(torch, name): name for name in _loaded.dtype_names()})
    _C = _loaded
except ImportError as error:
    _C = None
    missing_reason = f"inlay._C could not be imported ({error}); build it with `pip install .` and a C++17 compiler"

_threads = 0


def available() -> bool:
    return _C is not None


def module() -> ModuleType:
    """`_C`, following torch.get_num_threads(); raises when it was not built."""
    global _threads
    if _C is None:
        raise RuntimeError(f"inlay: wanted the native kernels: {missing_reason}")
    threads = torch.get_num_threads()
    if threads != _threads:
        _C.set_num_threads(threads)
        _threads = threads
    return _C


def openmp_runtimes() -> list[str]:
    """OpenMP runtimes mapped into this process (Linux; empty elsewhere)."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if line.count("/")}
    except OSError:
        return []
    pattern = re.compile(r"lib(gomp|omp|iomp5)[-.\w]*\.so")
    return sorted({os.path.realpath(path) for path in paths if pattern.match(os.path.basename(path))})


def _warn_on_second_runtime() -> None:
    if _C is None or not _C.build_info()["openmp"]:
        return
    runtimes = openmp_runtimes()
    if len(runtimes) > 1:
        warnings.warn(
            "inlay: wanted one OpenMP runtime in this process, got "
            + ", ".join(os.path.basename(path) for path in runtimes)
            + "; import torch before other OpenMP libraries, or set INLAY_FORCE_PATH=reference",
            RuntimeWarning,
            stacklevel=2,
        )


_warn_on_second_runtime()
