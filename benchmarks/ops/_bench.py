"""Shared by the op benchmarks: alternating runs, medians, one line per case."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from inlay import _native


def alternate(candidates: dict[str, Callable], seconds: float = 1.0, least: int = 5) -> dict[str, float]:
    """Median seconds of each candidate; they take turns, so that a busy machine disturbs all alike."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    while len(times[next(iter(times))]) < least or time.perf_counter() - start < seconds:
        for name, run in candidates.items():
            before = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - before)
    return {name: statistics.median(values) for name, values in times.items()}


def line(case: str, times: dict[str, float], gigabytes: float = 0.0, gigaflops: float = 0.0) -> None:
    """The first candidate is ours; the others are what it is compared with."""
    ours = next(iter(times))
    text = f"{case:44} {times[ours] * 1e3:9.3f} ms"
    if gigabytes:
        text += f" {gigabytes / times[ours]:8.1f} GB/s"
    if gigaflops:
        text += f" {gigaflops / times[ours]:8.1f} GFLOP/s"
    for name, value in list(times.items())[1:]:
        text += f"   {value / times[ours]:6.2f}x {name}"
    print(text, flush=True)


def check(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """Correctness first: at most twice torch's error against float64, plus a rounding."""
    error, allowed = ((t.double() - exact.double()).abs().max() for t in (ours, plain))
    unit = torch.finfo(ours.dtype).eps
    if not bool(error <= 2 * allowed + unit * exact.abs().max()):
        raise SystemExit(f"{what}: error {error:.3e}, torch's {allowed:.3e}; not timing wrong results")


def header(title: str) -> None:
    path = _native.module().isa() if _native.available() else "reference only"
    print(f"# {title}: torch {torch.__version__}, {torch.get_num_threads()} threads, {path}")
