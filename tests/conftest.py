"""Every test starts from the same seed, on one thread: xdist already fills the cores."""

from __future__ import annotations

import gc
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
