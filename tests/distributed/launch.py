"""torchrun, as a test starts it: two processes on this machine, on a free port, one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SECONDS = 150


def torchrun(script: Path, *arguments: str, processes: int = 2) -> str:
    """Run ``script`` in that many processes; what they printed. AssertionError with it if one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    command += [f"--nproc-per-node={processes}", str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-4000:]}\n{run.stderr[-8000:]}"
    return run.stdout
