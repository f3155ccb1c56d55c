"""What was built, what was found, what is chosen: `inlay doctor`, or `python -m inlay.doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator

import torch

from inlay import _native
from inlay.hardware import best_dtype
from inlay.ops._registry import RAW_OPS
from inlay.ops.lora_linear import ONE_PASS_BYTES, ONE_PASS_RANK
from inlay.ops.matmul_sum import ISA, ISAS
from inlay.ops.quantized_linear import CUDA_SMALL_ROWS, CUDA_SMALL_ROWS_PLAIN
from inlay.ops.submatrix import CUDA_NARROW

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "peft", "trl", "bitsandbytes", "numpy")
_VARIABLES = ("INLAY_ISA", "INLAY_FORCE_PATH", "OMP_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return "unknown"
    return ", ".join(flag for flag in _CPU_FLAGS if flag in flags) or "none of " + ", ".join(_CPU_FLAGS)


def _native_lines() -> Iterator[tuple[str, str]]:
    if not _native.available():
        yield "native kernels", f"MISSING: {_native.missing_reason}"
        yield "path of every op", "plain torch (correct, slower)"
        return
    engine = _native.module()
    info = engine.build_info()
    yield "native kernels", f"built by {info['compiler']} for {', '.join(info['isas'])}"
    try:
        chosen = engine.isa()
    except ValueError as error:
        chosen = f"NONE: {error}"
    yield "instruction set", f"{chosen} (this CPU can run {', '.join(engine.available_isas())})"
    yield "CUDA kernels", _cuda_build(info)
    openmp = "OpenMP" if info["openmp"] else "none: the compiler had no OpenMP, kernels use one thread"
    yield "threads", f"{engine.num_threads()} of {os.cpu_count()} CPUs, as torch.get_num_threads(); {openmp}"


def _cuda_build(info: dict) -> str:
    if not info["cuda"]:
        return "not built: on a GPU the plain-torch path runs; build with INLAY_CUDA=on where nvcc is"
    return f"built for {info['cuda_archs']}"


def _gpu_lines() -> Iterator[tuple[str, str]]:
    """Each GPU, and whether this build has code for it."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield "GPUs", "none visible" + ("" if built else f"; torch {torch.__version__} is a build without CUDA")
        return
    archs = _native.module().build_info().get("cuda_archs", "") if _native.available() else ""
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        code = (
            "compiled for it"
            if f"sm_{major}{minor}" in archs
            else "code that runs on it"
            if _native.covers(archs, (major, minor))
            else "NO code for it, so that plain torch runs; build with INLAY_CUDA_ARCHS"
        )
        suffix = f"; inlay: {code}" if archs else ""
        yield f"GPU {i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}{suffix}"


#: Raw ops whose CPU kernel wants AMX, and what runs without it.
_WITHOUT_AMX = {"submatrix_grad": "torch.mm in fp32", "submatrix_grad_into": "torch.mm in fp32"}

#: Raw ops whose CPU kernel wants certain instruction sets, and what runs on others.
_WANTED = {
    "matmul_sum": (ISAS, "torch's products, one by one"),
    "int8_matmul_sum": ((ISA,), 'nothing: compute="int8" is refused'),
    "expert_grad": ((ISA,), "torch.mm in fp32, expert by expert"),
    "expert_matmul": ((ISA,), "torch.mm, expert by expert"),
}

#: Raw ops that exist for their CUDA kernel, and what a CPU takes instead.
_FOR_CUDA = {
    "quantized_lora_linear": "quantized_linear_small and lora_add_",
    "lora_backward": "torch.mm and submatrix_grad",
}

#: What a call on a GPU takes where it is not simply the op's kernel, and why.
_ON_CUDA = {
    "submatrix_grad": "torch.mm with fp32 output; the native kernel where the narrow operand has up to "
    f"{CUDA_NARROW} columns and not a multiple of 8",
    "lora_backward": "torch.mm and submatrix_grad; the native kernel for ranks "
    f"up to {ONE_PASS_RANK} that are no multiple of 8, from {ONE_PASS_BYTES >> 20} MiB of gradient on",
    "attention_forward": "torch's own attention (flash attention is there already)",
    "attention_backward": "torch's own attention (flash attention is there already)",
    "attention_sinks": "the model's own code",
    "gated_delta_rule_forward": "the model's own code (flash-linear-attention's kernel where it is installed)",
    "gated_delta_rule_backward": "the model's own code (flash-linear-attention's kernel where it is installed)",
    "quantized_linear_small": f"native kernel: tensor cores up to {CUDA_SMALL_ROWS} rows of 16 bits, a warp per output "
    f"up to {CUDA_SMALL_ROWS_PLAIN} of others; more rows dequantize for torch.matmul",
}


#: The CUDA kernel of an op where its name is another one.
_CUDA_KERNELS = {"lora_add": "lora_expand"}


def _on_cpu(kernel: str, isa: str) -> str:
    if kernel in _WITHOUT_AMX and isa != "amx":
        return f"{_WITHOUT_AMX[kernel]} (the kernel wants AMX)"
    wanted, instead = _WANTED.get(kernel, ((isa,), ""))
    if isa not in wanted:
        return f"{instead} (the kernel wants {' or '.join(wanted)})"
    return _FOR_CUDA.get(kernel, f"native, {isa}")


def _on_cuda(name: str, kernel: str, built: list[str]) -> str:
    if name.startswith(("attention_", "gated_delta_rule_")):
        return _ON_CUDA[name]
    if not built:
        return "plain torch (no CUDA kernels in this build)"
    if _CUDA_KERNELS.get(kernel, kernel) not in built:
        return "plain torch (this op has no CUDA kernel)"
    if torch.cuda.is_available() and not _native.has_code_for(torch.cuda.current_device()):
        return "plain torch (this build has no code for the GPU)"
    return _ON_CUDA.get(name, "native kernel")


def _op_lines() -> Iterator[tuple[str, str]]:
    """Which implementation a call of each raw op takes, per device, and why."""
    if not _native.available():
        return
    engine = _native.module()
    forced = os.environ.get("INLAY_FORCE_PATH") == "reference"
    for name in sorted(RAW_OPS):
        kernel = name.rstrip("_").removesuffix("_small")
        cpu, cuda = _on_cpu(kernel, engine.isa()), _on_cuda(name, kernel, engine.build_info().get("cuda_ops", []))
        if forced:
            cpu = cuda = "plain torch (INLAY_FORCE_PATH=reference)"
        yield f"op {name}", f"CPU: {cpu}; CUDA: {cuda}"


def _openmp_lines() -> Iterator[tuple[str, str]]:
    runtimes = _native.openmp_runtimes()
    names = ", ".join(os.path.basename(path) for path in runtimes) or "none seen"
    if len(runtimes) > 1:
        names += "  WARNING: two thread pools compete for the CPUs; import torch before other OpenMP libraries"
    yield "OpenMP runtimes", names


def _torch_lines() -> Iterator[tuple[str, str]]:
    yield "CPU", f"{platform.machine()}: {_cpu_flags()}"
    fast = best_dtype() == torch.bfloat16
    yield "dtype advice", "bfloat16 is fast here" if fast else "no bf16 instructions: float32 is faster"


def report() -> list[tuple[str, str]]:
    """(what, finding) pairs."""
    lines = [("inlay", f"{_version('inlay')} on Python {platform.python_version()}, {platform.platform()}")]
    lines += [*_native_lines(), *_openmp_lines(), *_gpu_lines(), *_torch_lines()]
    lines += [(package, _version(package)) for package in _PACKAGES]
    lines += [(name, os.environ[name]) for name in _VARIABLES if name in os.environ]
    return [*lines, *_op_lines()]


def main() -> int:
    """Print the report; the exit status is 1 if the native kernels are missing."""
    for what, finding in report():
        print(f"{what:28} {finding}")
    return 0 if _native.available() else 1


if __name__ == "__main__":
    sys.exit(main())
