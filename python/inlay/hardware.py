"""What this machine computes fast."""

from __future__ import annotations

import time

import torch

from .ops.matmul_sum import MANY, packs

#: Rows, inputs and outputs of the product that is timed: large enough that its time is the arithmetic's, some 10 ms.
_TIMED = (256, 1024, 1024)


def best_cpu_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively (AVX512-BF16 or AMX), else float32.

    Without those instructions torch emulates bf16. Products of many rows are inlay's own there and as fast in either,
    so that a training step takes the same time in half the memory; but what runs outside of them is slow.
    """
    flags = _cpu_flags()
    return torch.bfloat16 if flags & {"avx512_bf16", "amx_bf16"} else torch.float32


def best_dtype(device: str | None = None) -> torch.dtype:
    """What ``dtype: auto`` stands for: bfloat16 where ``device`` multiplies it natively, else float32.

    On CUDA that is compute capability 8.0 and newer. What trains keeps float32 master values, or an exact residual.

    Args:
        device: "cpu" or "cuda"; None is CUDA where there is one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return best_cpu_dtype()
    known = torch.cuda.is_available()  # an estimate may ask for a GPU that is not here
    return torch.bfloat16 if not known or torch.cuda.get_device_capability() >= (8, 0) else torch.float32


def bf16_products(device: str = "cpu") -> float:
    """How many times as fast a product runs in bfloat16 as in float32, timed here and now."""
    return _seconds(torch.float32, device) / _seconds(torch.bfloat16, device)


def _seconds(dtype: torch.dtype, device: str) -> float:
    rows, inputs, outputs = _TIMED
    x, weight = (torch.ones(n, inputs, dtype=dtype, device=device) for n in (rows, outputs))
    times = []
    for _ in range(6):  # the first one prepares
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def dtype_line(dtype: torch.dtype, device: str = "cpu") -> str | None:
    """What to say of a model in ``dtype`` about to train on ``device``: its dtype, and how much faster bfloat16 is or
    would be, timed now. None for other dtypes and devices, of which nothing is known."""
    if dtype not in (torch.float32, torch.bfloat16) or device not in ("cpu", "cuda"):
        return None
    fast = best_dtype(device) == torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and not fast:
        return name
    if not fast and device == "cpu" and packs(torch.empty(MANY, 1, dtype=dtype)):
        return (
            f"{name}; torch emulates it here, and a step's products are inlay's own, as fast as in float32 and in half "
            "the memory; products of few rows, as in batched generation, are slower"
        )
    factor = f"torch's products run {bf16_products(device):.1f}x as fast in bfloat16 as in float32 here (timed now)"
    if dtype == torch.bfloat16:
        return f"{name}; {factor}" + ("" if fast else "; it is emulated: load the model in float32")
    return f'{name}; {factor}: load the model with dtype="bfloat16", what trains stays float32'


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            lines = [line for line in cpuinfo if line.startswith("flags")]
    except OSError:  # not Linux
        return set()
    return set(lines[0].partition(":")[2].split()) if lines else set()
