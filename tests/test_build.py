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
    assert "CPUs only" in report["op submatrix_grad"]
    monkeypatch.setenv("INLAY_FORCE_PATH", "reference")
    assert "INLAY_FORCE_PATH=reference" in dict(doctor.report())["op swiglu_forward"]


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
        ("cuda/sources.cmake", "cuda", "cu", "INLAY_OP"),
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
