"""Tests that only a GPU can pass; every test here is marked gpu."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

from inlay import _native
from inlay.ops import force_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def gpu():
    """The device; every op runs on its CUDA kernel."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if not _native.has_cuda():
        pytest.skip("this build has no CUDA kernels")
    with force_path("native"):
        yield torch.device("cuda")
