"""Shared by the op benchmarks: alternating runs, medians, one line per case.

``python benchmarks/ops/bench_rms_norm.py --json out.json`` also writes the cases with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import atexit
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from inlay import _native

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _measure

_cases: list[dict] = []


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
    milliseconds = {name: value * 1e3 for name, value in times.items()}
    _cases.append({"case": case, "milliseconds": milliseconds, "gigabytes": gigabytes, "gigaflops": gigaflops})


def check(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """Correctness first: at most twice torch's error against float64, plus a rounding."""
    error, allowed = ((t.double() - exact.double()).abs().max() for t in (ours, plain))
    unit = torch.finfo(ours.dtype).eps
    if not bool(error <= 2 * allowed + unit * exact.abs().max()):
        raise SystemExit(f"{what}: error {error:.3e}, torch's {allowed:.3e}; not timing wrong results")


def header(title: str) -> None:
    """Print what is measured and on what; with ``--json FILE`` the cases are written there at the end."""
    path = _native.module().isa() if _native.available() else "reference only"
    print(f"# {title}: torch {torch.__version__}, {torch.get_num_threads()} threads, {path}")
    parser = argparse.ArgumentParser(description=f"Benchmark of {title}: correctness first, then time.")
    parser.add_argument("--json", type=Path)
    if (target := parser.parse_known_args()[0].json) is not None:
        atexit.register(_write, target, title, path)


def _write(target: Path, title: str, path: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    result = {"op": title, "isa": path, "machine": _measure.provenance(), "cases": _cases}
    target.write_text(json.dumps(result, indent=2))
