"""The build: what is in the module, what the switches do, what doctor says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from inlay import _native, doctor

ROOT = Path(__file__).resolve().parents[1]


def test_doctor_reports():
    text = "\n".join(finding for _, finding in doctor.report())
    assert "torch" in dict(doctor.report())
    assert ("built by" in text) == _native.available()


@pytest.mark.skipif(not _native.available(), reason="no native module")
def test_scalar_always_exists():
    engine = _native.module()
    assert "scalar" in engine.available_isas()
    assert set(engine.available_isas()) <= set(engine.build_info()["isas"])


def test_contract_names_every_kernel_file():
    """ops.h, csrc/cpu and CMakeLists.txt agree."""
    listed = set(re.findall(r"csrc/cpu/(\w+)\.cpp", (ROOT / "CMakeLists.txt").read_text()))
    assert listed == {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    for op in re.findall(r"^INLAY_OP\((\w+)", (ROOT / "csrc" / "ops.h").read_text(), re.MULTILINE):
        assert re.search(rf"^void {op}\(", sources, re.MULTILINE), op


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("ninja"), reason="no cmake and ninja")
@pytest.mark.parametrize("value, message", [("on", "INLAY_CUDA=on"), ("maybe", "wanted auto, on or off")])
def test_cuda_switch_refuses(tmp_path, value, message):
    pybind11 = pytest.importorskip("pybind11")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DINLAY_CUDA={value}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode and message in result.stderr
