"""What this machine computes fast."""

from __future__ import annotations

import torch


def best_cpu_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively (AVX512-BF16 or AMX), else float32.

    Without those instructions bf16 is emulated: a training step on an AVX2-only CPU was measured
    4x slower in bf16 than in fp32.
    """
    flags = _cpu_flags()
    return torch.bfloat16 if flags & {"avx512_bf16", "amx_bf16"} else torch.float32


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            lines = [line for line in cpuinfo if line.startswith("flags")]
    except OSError:  # not Linux
        return set()
    return set(lines[0].partition(":")[2].split()) if lines else set()
