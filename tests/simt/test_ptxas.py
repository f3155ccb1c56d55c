"""Every kernel compiles for every target without spilling registers or using a stack, for what INLAY_CUDA=on builds."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "cuda"
SOURCES = sorted(path.name for path in CUDA.glob("*.cu"))
OPTIONS = re.search(r"INLAY_NVCC_OPTIONS (.*)\)", (CUDA / "sources.cmake").read_text())[1].split()
BUILT = re.findall(r"(\d+a?)-real", re.search(r'INLAY_CUDA_ARCHS "(.*?)"', (CUDA / "build.cmake").read_text())[1])

#: Kernels that may use local memory: name -> bytes of stack, and why. None does.
EXPECTED_STACK: dict[str, int] = {}
#: Two blocks of 256 threads then fit a multiprocessor.
MOST_REGISTERS = 128
#: What one block can have where there is least, sm_86 and sm_89.
MOST_SHARED = 99 << 10

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spilled: int


def compile_kernels(source: Path, archs: list[str], into: Path) -> list[Kernel]:
    """Of every architecture, in one run of nvcc: the host's part is compiled once."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command = ["nvcc", "-std=c++17", *OPTIONS, "-DINLAY_HAVE_CUDA", "-fatbin", *targets, "-Xptxas", "-v"]
    command += ["-I", str(ROOT / "csrc"), "-I", str(CUDA), "-o", str(into / f"{source.stem}.fatbin")]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = []
    for part in result.stderr.split("Compiling entry function")[1:]:
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        named = re.search(r"'(\S+)' for '(\S+)'", part)
        assert numbers and used and named, part
        stack, stores, loads = (int(n) for n in numbers.groups())
        name, arch = named.groups()
        kernels.append(Kernel(name, arch, int(used[1]), int(shared[1]) if shared else 0, stack, stores + loads))
    return kernels


def complaint(kernel: Kernel) -> str | None:
    """What is wrong with it."""
    stack = sum(n for part, n in EXPECTED_STACK.items() if part in kernel.name)
    if kernel.spilled or kernel.stack > stack:
        return f"{kernel}: wanted no local memory"
    if kernel.registers > MOST_REGISTERS:
        return f"{kernel}: wanted at most {MOST_REGISTERS} registers"
    return f"{kernel}: wanted at most {MOST_SHARED} bytes of shared memory" if kernel.shared > MOST_SHARED else None


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills(tmp_path, source):
    kernels = compile_kernels(CUDA / source, BUILT, tmp_path)
    assert {kernel.arch for kernel in kernels} == {f"sm_{arch}" for arch in BUILT} or source == "runtime.cu"
    for kernel in kernels:
        print(kernel)
    assert [text for text in map(complaint, kernels) if text] == []


def test_a_stack_is_noticed(tmp_path):
    """An array with a run-time index has to live in local memory."""
    source = tmp_path / "local.cu"
    source.write_text(
        "__global__ void local(float* out, const int* at) {\n"
        "  float values[64];\n"
        "  for (int i = 0; i < 64; ++i) values[at[i]] = out[i];\n"
        "  out[0] = values[at[64]];\n"
        "}\n"
    )
    (kernel,) = compile_kernels(source, ["80"], tmp_path)
    assert kernel.stack >= 256 and "wanted no local memory" in complaint(kernel)


def test_a_spill_is_noticed(tmp_path):
    """More values alive than 32 registers hold."""
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spill(float* out) {\n"
        "  float values[96];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) values[i] = out[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) out[i * 1024 + threadIdx.x] = values[95 - i];\n"
        "}\n"
    )
    (kernel,) = compile_kernels(source, ["80"], tmp_path)
    assert kernel.spilled > 0 and "wanted no local memory" in complaint(kernel)
