"""Every kernel compiles for the oldest and the newest target without spilling registers or using a stack."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.name for path in (ROOT / "cuda").glob("*.cu"))
OPTIONS = re.search(r"INLAY_NVCC_OPTIONS (.*)\)", (ROOT / "cuda" / "sources.cmake").read_text())[1].split()
ARCHS = ("sm_80", "sm_90a")

#: Kernels that may use local memory: name -> bytes of stack, and why. None does.
EXPECTED_STACK: dict[str, int] = {}
#: Two blocks of 256 threads then fit a multiprocessor.
MOST_REGISTERS = 128


@dataclass
class Kernel:
    name: str
    registers: int
    shared: int
    stack: int
    spilled: int


def compile_kernels(source: str, arch: str, into: Path) -> list[Kernel]:
    command = ["nvcc", "-std=c++17", *OPTIONS, "-DINLAY_HAVE_CUDA", "-cubin", f"-arch={arch}", "-Xptxas", "-v"]
    command += ["-I", str(ROOT / "csrc"), "-I", str(ROOT / "cuda"), "-o", str(into / f"{source}.cubin")]
    result = subprocess.run([*command, str(ROOT / "cuda" / source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = []
    for part in result.stderr.split("Compiling entry function")[1:]:
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert numbers and used, part
        name = re.search(r"'(\S+)'", part)[1]
        stack, stores, loads = (int(n) for n in numbers.groups())
        kernels.append(Kernel(name, int(used[1]), int(shared[1]) if shared else 0, stack, stores + loads))
    return kernels


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills(tmp_path, source, arch):
    kernels = compile_kernels(source, arch, tmp_path)
    assert kernels or source == "runtime.cu"
    for kernel in kernels:
        stack = sum(n for part, n in EXPECTED_STACK.items() if part in kernel.name)
        print(kernel)
        assert kernel.spilled == 0 and kernel.stack <= stack, f"{kernel} on {arch}: wanted no local memory"
        assert kernel.registers <= MOST_REGISTERS, f"{kernel} on {arch}: wanted at most {MOST_REGISTERS} registers"
