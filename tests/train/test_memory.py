import sys

import pytest
import torch

from inlay import hardware
from inlay.train import PeakMemory, best_cpu_dtype, best_dtype

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
    assert best_cpu_dtype() == best_dtype("cpu") == dtype


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_bf16_only_where_the_gpu_has_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert best_dtype("cuda") == best_dtype() == dtype


@pytest.mark.parametrize("has_bf16, own_products", [(True, True), (False, True), (False, False)])
def test_what_is_said_of_a_dtype(monkeypatch, has_bf16, own_products):
    monkeypatch.setattr(hardware, "packs", lambda x: own_products)
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: {"avx512_bf16"} if has_bf16 else set())
    monkeypatch.setattr(hardware, "_seconds", lambda dtype, device: {torch.float32: 6.0, torch.bfloat16: 2.0}[dtype])
    plain, half = hardware.dtype_line(torch.float32), hardware.dtype_line(torch.bfloat16)
    if own_products and not has_bf16:
        assert "products are inlay's own, as fast as in float32" in half and "load" not in half
    else:
        assert "products run 3.0x as fast in bfloat16" in half and ("emulated" in half) != has_bf16
    assert plain == ("float32" if not has_bf16 else plain) and ('dtype="bfloat16"' in plain) == has_bf16
    assert hardware.dtype_line(torch.float16) is None


def test_the_factor_is_timed_and_not_made_up():
    assert 0.01 < hardware.bf16_products() < 100
