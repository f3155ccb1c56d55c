"""`place`: runs a kernel's test on the CPU kernels, the emulated CUDA kernels in three thread orders, and a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]
import _build as build  # noqa: E402

from inlay import _native  # noqa: E402
from inlay.ops import force_path  # noqa: E402

ORDERS = ("simt-forward", "simt-reverse", "simt-random")
# A process that runs under AddressSanitizer (test_sanitizers.py) checks the instrumented build and nothing else.
SANITIZED = os.environ.get("INLAY_SIMT_BUILD") == "sanitized"
PLACES = ["simt-random"] if SANITIZED else ["cpu", *ORDERS, pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under sanitizers one 16-bit dtype stands for both: where an access falls does not depend on its bits."""
    if SANITIZED:
        items[:] = [item for item in items if _parameter(item, "dtype") != torch.float16]


def _parameter(item: pytest.Item, name: str) -> object:
    return item.callspec.params.get(name) if hasattr(item, "callspec") else None


@pytest.fixture(scope="session")
def emulated():
    if build.missing():
        pytest.skip(build.missing())
    return build.load("sanitized" if SANITIZED else "plain")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device to put inputs on; ops run on the kernels of the place."""
    if request.param in ORDERS:
        engine = request.getfixturevalue("emulated")
        with _native.using(engine), force_path("native"):
            engine.set_isa(request.param)
            yield torch.device("cpu")
        return
    if request.param == "cuda" and not (torch.cuda.is_available() and _native.has_cuda()):
        pytest.skip("no GPU" if _native.has_cuda() else "this build has no CUDA kernels")
    if not _native.available():
        pytest.skip("no native module")
    with force_path("native"):
        yield torch.device(request.param)
