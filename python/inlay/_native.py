"""The compiled engine `inlay._C`, if it was built: loading it, its thread count, its OpenMP runtime, its streams.

torch is imported first on purpose: its wheel brings libgomp, and an extension loaded afterwards shares
that one runtime. The other order can put two OpenMP runtimes, hence two thread pools, in one process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

_C: ModuleType | None
missing_reason: str | None = None  # why `_C` is None, in words for an error message


def _introduce_torch(engine: ModuleType) -> ModuleType:
    """Tell the engine, which knows no torch, torch's dtypes and where its streams are."""
    engine.init_dtypes({getattr(torch, name): name for name in engine.dtype_names()})
    current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from CPU builds of torch
    if current_stream is not None:
        engine.init_streams(current_stream)
    return engine


try:
    _C = _introduce_torch(importlib.import_module("inlay._C"))
except ImportError as error:
    _C = None
    missing_reason = f"inlay._C could not be imported ({error}); build it with `pip install .` and a C++17 compiler"

_threads = 0


def available() -> bool:
    return _C is not None


def has_cuda() -> bool:
    """True if the engine has CUDA kernels; whether there is a GPU is another question."""
    return _C is not None and bool(_C.build_info()["cuda"])


def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Does "sm_80 sm_90a compute_80" have code for a GPU of this compute capability?

    Machine code runs on its own major version from its minor version on ("a": on that version alone); PTX, which the
    driver compiles, on every later one.
    """
    for kind, major, minor, exact in re.findall(r"(sm|compute)_(\d+)(\d)(a?)", archs):
        built = int(major), int(minor)
        if capability == built or (kind == "compute" and not exact and capability > built):
            return True
        if kind == "sm" and not exact and capability[0] == built[0] and capability > built:
            return True
    return False


@functools.cache
def has_code_for(device: int) -> bool:
    """True if the engine was built with code for this GPU."""
    return _C is not None and covers(_C.build_info().get("cuda_archs", ""), torch.cuda.get_device_capability(device))


_cuda_tensors_fit = has_cuda()


def runs_on(tensor: torch.Tensor) -> bool:
    """True if the engine has kernels for the device of ``tensor``."""
    return tensor.is_cpu or (tensor.is_cuda and _cuda_tensors_fit and has_code_for(tensor.get_device()))


@contextlib.contextmanager
def using(engine: ModuleType) -> Iterator[ModuleType]:
    """Let every op run on another engine, for example the emulated CUDA kernels, inside this context."""
    global _C, _threads, _cuda_tensors_fit
    before = _C, _threads
    _C, _threads = _introduce_torch(engine), 0
    _cuda_tensors_fit = has_cuda()
    try:
        yield engine
    finally:
        _C, _threads = before
        _cuda_tensors_fit = has_cuda()


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
