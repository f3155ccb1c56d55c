"""Builds the emulated CUDA kernels (cuda/simt/build.cmake) into build/simt, again only when a source has changed."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "simt"
TARGETS = {"plain": "simt_plain", "sanitized": "simt_sanitized", "broken": "simt_broken"}
_SOURCES = ("CMakeLists.txt", "cuda/**/*", "csrc/*", "csrc/entries/*", "tests/simt/*.cu")


def _find(tool: str) -> str | None:
    return shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    absent = [tool for tool in ("cmake", "ninja", "g++") if not _find(tool)]
    absent += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    return f"the emulated build wants {', '.join(absent)}" if absent else None


def _fingerprint() -> str:
    digest = hashlib.sha256(sys.executable.encode())
    for path in sorted({p for pattern in _SOURCES for p in ROOT.glob(pattern) if p.is_file()}):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}\n{result.stderr}")


def build(name: str) -> Path:
    """The built file of ``name``: plain and sanitized are Python modules, broken is a program."""
    import pybind11

    FOLDER.mkdir(parents=True, exist_ok=True)
    stamp, fingerprint = FOLDER / f"{name}.stamp", _fingerprint()
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes share one build
        if not stamp.exists() or stamp.read_text() != fingerprint:
            cmake = _find("cmake") or "cmake"
            options = ["-DINLAY_SIMT=on", "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_MAKE_PROGRAM={_find('ninja')}"]
            options += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
            _run([cmake, "-S", str(ROOT), "-B", str(FOLDER), "-G", "Ninja", *options])
            _run([cmake, "--build", str(FOLDER), "--target", TARGETS[name]])
            stamp.write_text(fingerprint)
    return FOLDER / "simt_broken" if name == "broken" else next((FOLDER / name).glob("_C*.so"))


def load(name: str) -> ModuleType:
    path = str(build(name))
    loader = ExtensionFileLoader("inlay_simt._C", path)
    spec = importlib.util.spec_from_file_location("inlay_simt._C", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
