"""The kernels' tests again, under AddressSanitizer and UBSan: reads and writes outside a tensor, misaligned vectors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import _build as build
import pytest

HERE = Path(__file__).parent


def _runtime() -> str | None:
    """libasan, which has to be in the process before Python is."""
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.mark.slow
@pytest.mark.parametrize("file", [path.name for path in sorted(HERE.glob("test_kernels_*.py"))])
def test_kernels_under_sanitizers(file):
    if build.missing():
        pytest.skip(build.missing())
    if _runtime() is None:
        pytest.skip("g++ has no libasan.so")
    build.build("sanitized")
    environment = {
        **os.environ,
        "LD_PRELOAD": _runtime(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they like
        "INLAY_SIMT_BUILD": "sanitized",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    assert " passed" in result.stdout
