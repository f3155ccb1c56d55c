"""torchrun, as a test starts it: two processes on this machine, on a free port, one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

fcntl = pytest.importorskip("fcntl")  # not on Windows

SECONDS = 150


def once(tmp_path_factory, name: str, fill: Callable[[Path], object]) -> Path:
    """A folder that ``fill`` fills once for all of pytest-xdist's workers: they wait for the first."""
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, done = shared / name, shared / f"{name}.done"
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            fill(folder)
            done.touch()
    return folder


def torchrun(script: Path, *arguments: str, processes: int = 2) -> str:
    """Run ``script`` in that many processes; what they printed. AssertionError with it if one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    command += [f"--nproc-per-node={processes}", str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-4000:]}\n{run.stderr[-8000:]}"
    return run.stdout
