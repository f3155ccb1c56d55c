"""The build: what is in the module, what the switches do, what doctor says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inlay import _native, doctor
from inlay.ops._registry import RAW_OPS

ROOT = Path(__file__).resolve().parents[1]


def test_doctor_reports():
    text = "\n".join(finding for _, finding in doctor.report())
    assert "torch" in dict(doctor.report())
    assert ("built by" in text) == _native.available()


@pytest.mark.skipif(not _native.available(), reason="no native module")
def test_doctor_says_what_every_op_takes_and_why(monkeypatch):
    report = dict(doctor.report())
    assert {f"op {name}" for name in RAW_OPS} <= set(report)
    if not _native.has_cuda():
        assert "no CUDA kernels in this build" in report["op swiglu_forward"]
    assert "torch's own attention" in report["op attention_backward"].partition("CUDA")[2]
    monkeypatch.setenv("INLAY_FORCE_PATH", "reference")
    assert "INLAY_FORCE_PATH=reference" in dict(doctor.report())["op swiglu_forward"]


def test_doctor_on_gpus(monkeypatch):
    """What is said of a GPU, and of the ops on it, from what a build has code for."""
    archs = {"value": "sm_80 sm_86 sm_89 sm_90a compute_80"}

    class Engine:
        def __getattr__(self, name):
            return getattr(_native.module(), name)

        def build_info(self):
            ops = [name.rstrip("_").removesuffix("_small") for name in RAW_OPS]
            return {"isas": ["scalar"], "openmp": True, "compiler": "a test", "cuda": True, "cuda_ops": ops} | {
                "cuda_archs": archs["value"]
            }

        def isa(self):
            return "scalar"

        def available_isas(self):
            return ["scalar"]

        def num_threads(self):
            return 1

    monkeypatch.setattr(_native, "_C", Engine())
    monkeypatch.setattr(_native, "module", Engine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "some GPU")
    for capability, value, code, op in [
        ((9, 0), "sm_80 sm_90a compute_80", "compiled for it", "native kernel"),
        ((10, 0), "sm_80 sm_90a compute_80", "code that runs on it", "native kernel"),
        ((7, 5), "sm_80 sm_90a compute_80", "NO code for it", "no code for the GPU"),
        ((10, 0), "sm_90a", "NO code for it", "no code for the GPU"),
    ]:
        archs["value"] = value
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=None, capability=capability: capability)
        _native.has_code_for.cache_clear()
        report = dict(doctor.report())
        assert code in report["GPU 0"] and op in report["op swiglu_forward"].partition("CUDA")[2]
        assert value in report["CUDA kernels"]
        assert report["dtype advice"].startswith("bfloat16 is" if capability >= (8, 0) else "no bf16")
    _native.has_code_for.cache_clear()


@pytest.mark.parametrize(
    "archs, capability, covered",
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False),
        ("sm_90a compute_80", (12, 1), True),
        ("compute_80", (7, 5), False),
        ("compute_90a", (10, 0), False),
        ("sm_100", (10, 3), True),
        ("", (9, 0), False),
    ],
)
def test_which_code_runs_on_which_gpu(archs, capability, covered):
    assert _native.covers(archs, capability) is covered


@pytest.mark.skipif(not _native.available(), reason="no native module")
def test_scalar_always_exists():
    engine = _native.module()
    assert "scalar" in engine.available_isas()
    assert set(engine.available_isas()) <= set(engine.build_info()["isas"])


def _ops(macro):
    return re.findall(rf"^{macro}\((\w+)", (ROOT / "csrc" / "ops.h").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "listing, folder, suffix, macro",
    [
        ("CMakeLists.txt", "csrc/cpu", "cpp", "INLAY_(?:CPU_)?OP"),
        ("cuda/sources.cmake", "cuda", "cu", "INLAY_(?:CUDA_)?OP"),
    ],
)
def test_contract_names_every_kernel_file(listing, folder, suffix, macro):
    """ops.h, the folders of kernels and what is compiled agree."""
    listed = set(re.findall(rf"{folder}/(\w+)\.{suffix}\b", (ROOT / listing).read_text()))
    assert listed == {path.stem for path in (ROOT / folder).glob(f"*.{suffix}")}
    sources = "".join(path.read_text() for path in (ROOT / folder).glob(f"*.{suffix}"))
    for op in _ops(macro):
        assert re.search(rf"^void {op}\(", sources, re.MULTILINE), op


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("ninja"), reason="no cmake and ninja")
@pytest.mark.parametrize("value, message", [("on", "wanted nvcc, found none"), ("maybe", "wanted auto, on or off")])
def test_cuda_switch_refuses(tmp_path, value, message):
    pybind11 = pytest.importorskip("pybind11")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DINLAY_CUDA={value}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run([*command, "-DINLAY_NVCC="], capture_output=True, text=True)
    assert result.returncode and message in result.stderr


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("ninja"), reason="no cmake and ninja")
def test_auto_leaves_an_old_gpu_to_torch(tmp_path):
    """Below sm_80 there is no cp.async to compile: CPU kernels only, and the reason."""
    pybind11 = pytest.importorskip("pybind11")
    for name, said in (("nvcc", ""), ("nvidia-smi", "7.5")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {said}\n")
        (tmp_path / name).chmod(0o755)
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", "-DINLAY_CUDA=auto"]
    command += [f"-DINLAY_NVCC={tmp_path / 'nvcc'}", f"-DINLAY_NVIDIA_SMI={tmp_path / 'nvidia-smi'}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "wanted a GPU of compute capability 8.0 or newer, got 7.5" in result.stdout
    assert "CPU kernels only" in result.stdout


@pytest.mark.skipif(not _native.available() or _native.has_cuda(), reason="needs a build without CUDA kernels")
def test_cuda_tensors_on_a_build_without_cuda_kernels():
    """The engine says what is missing; the ops take their reference instead."""

    class OnCuda(torch.Tensor):
        is_cpu, is_cuda = False, True

        def get_device(self):
            return 0

    x = torch.ones(2, 4).as_subclass(OnCuda)
    with pytest.raises(ValueError, match="this build has no CUDA kernels; build with INLAY_CUDA=on"):
        _native.module().swiglu_forward(x, x, x, 0)
    with pytest.raises(ValueError, match="wanted all on one device"):
        _native.module().swiglu_forward(torch.ones(2, 4), x, x, 0)
