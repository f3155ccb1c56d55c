"""`path`: runs a test on the plain-torch reference and on every instruction set this machine has.

"wide" is the best of them with products summed as on a GPU, for the tests of linears.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from inlay import _native
from inlay.ops import force_path

sys.path.insert(0, str(Path(__file__).parent))

PATHS = ["reference"]
if _native.available():
    PATHS += [*_native.module().available_isas(), "wide"]
LINEARS = {"test_lora_linear", "test_quantized_stack", "test_stacked_linear", "test_submatrix_linear", "test_swiglu"}


def pytest_collection_modifyitems(items):
    """Other ops have no products that "wide" would change."""
    here = Path(__file__).parent

    def same(item):
        asked = item.callspec.params.get("path") if hasattr(item, "callspec") else None
        return asked == "wide" and item.path.parent == here and item.path.stem not in LINEARS

    items[:] = [item for item in items if not same(item)]


@pytest.fixture(params=PATHS)
def path(request):
    if request.param == "reference":
        with force_path("reference"):
            yield "reference"
        return
    engine = _native.module()
    if request.param == "wide":
        request.getfixturevalue("wide_sums")
    else:
        engine.set_isa(request.param)
    with force_path("native"):
        yield request.param
    engine.set_isa("")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
