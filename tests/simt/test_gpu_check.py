"""`make gpu-check` without a GPU: it selects tests, and writes down what was not run and why."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def _check(out, **variables):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "check.py")]
    environment = {**os.environ, "OUT": str(out), **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_what_was_not_run_and_why(tmp_path):
    result = _check(tmp_path, PARTS="tests,ops")
    assert result.returncode == 0, result.stderr
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert {part["status"] for part in parts.values()} == {"not run"}
    selected = re.fullmatch(r"no GPU visible to torch; selected: (\d+)/\d+ tests .*", parts["tests"]["reason"])
    assert selected and int(selected[1]) > 100
    assert parts["ops"]["reason"] == "no GPU visible to torch" and parts["build"]["reason"] == "not asked for"


def test_refuses_unknown_parts(tmp_path):
    result = _check(tmp_path, PARTS="build,dance")
    assert result.returncode == 2 and "got dance" in result.stderr


def test_its_build_comes_before_an_editable_install(tmp_path):
    """Without this, a checkout that `make test` has set up would measure its CPU build."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
    import check

    (tmp_path / "inlay").mkdir()
    (tmp_path / "inlay" / "__init__.py").write_text("where = 'here'\n")
    (tmp_path / "sitecustomize.py").write_text(check._NOT_EDITABLE)
    command = [sys.executable, "-c", "import inlay; print(inlay.where)"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout == "here\n"


def test_the_libraries_do_the_same_work():
    """What ours is timed against, on a CPU: the same numbers from the same weight."""
    pytest.importorskip("bitsandbytes")
    sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
    import libraries

    from inlay.ops.quantize_blockwise import dequantize_4bit, quantize_4bit, quantize_absmax

    torch.manual_seed(0)
    dense = (torch.randn(64, 128) / 11).bfloat16()
    packed, absmax = quantize_4bit(dense, "nf4", 64)
    codes, absmax, offset = quantize_absmax(absmax)
    ours = dequantize_4bit(packed, absmax, "nf4", 64, 64, 128, torch.bfloat16, codes, offset)
    assert torch.equal(libraries.dequantize([dense])["bitsandbytes"][0](), ours)
    assert libraries.library("no_such_library") is None
