"""Every test starts from the same seed, on one thread: xdist already fills the cores."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # families, comparing, oracle: shared by all folders
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)


def pytest_collection_finish():
    gc.freeze()  # Trainer collects garbage after every run; going through all that torch made takes longer than the run


@pytest.fixture
def wide_sums(monkeypatch):
    """Products summed as on a GPU, on CPU tensors."""
    for name in ("base_products", "stacked_linear", "swiglu"):
        monkeypatch.setattr(importlib.import_module(f"inlay.ops.{name}"), "wide_sums", lambda x: True)
