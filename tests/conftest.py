"""Every test starts from the same seed, on one thread: xdist already fills the cores."""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from inlay import _native

sys.path.insert(0, str(Path(__file__).parent))  # families, comparing, oracle: shared by all folders
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_instruction_set():
    """No test leaves the engine on other kernels than it found: the tests after it would be about those."""
    engine = _native._C
    before = engine.isa() if engine is not None else None
    yield
    if engine is not None and engine.isa() != before:
        left = engine.isa()
        engine.set_isa("")
        pytest.fail(f"the engine ran on {before} before this test and on {left} after it; set it back")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a test that skips for want of a package fails: the set-up has to install what the tests need."""
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if re.search(r"could not import|not installed|[Nn]o module named", reason):
            report.outcome, report.longrepr = "failed", f"{reason} (in CI what a test needs must be installed)"
    return report


def pytest_collectreport(report):
    """The same for a whole file that skips itself while it is imported."""
    if os.environ.get("CI") and report.skipped and "could not import" in str(report.longrepr):
        report.outcome, report.longrepr = "failed", f"{report.longrepr} (in CI what a test needs must be installed)"


def pytest_collection_finish():
    gc.freeze()  # Trainer collects garbage after every run; going through all that torch made takes longer than the run


@pytest.fixture
def wide_sums(monkeypatch):
    """Products summed as on a GPU, on CPU tensors."""
    for name in ("base_products", "stacked_linear", "swiglu"):
        monkeypatch.setattr(importlib.import_module(f"inlay.ops.{name}"), "wide_sums", lambda x: True)
