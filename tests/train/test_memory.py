import sys

import pytest
import torch

from inlay.train import PeakMemory, best_cpu_dtype, hardware

MB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a high-water mark that can be reset")
def test_peak_counts_what_was_freed_and_not_what_came_before():
    before = torch.ones(64 * MB, dtype=torch.uint8)
    memory = PeakMemory()
    if memory.bytes() is None:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    assert memory.bytes() < 16 * MB
    during = torch.ones(48 * MB, dtype=torch.uint8)
    del during
    assert 40 * MB < memory.bytes() < 64 * MB
    assert before.sum().item() == 64 * MB


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16),
        ({"avx2", "avx512f"}, torch.float32),
        (set(), torch.float32),
    ],
)
def test_bf16_only_where_the_cpu_has_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: flags)
    assert best_cpu_dtype() == dtype
