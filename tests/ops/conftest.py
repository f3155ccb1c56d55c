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
#: Attention and products have kernels of their own for it; the others' are those of avx512.
PAIRS = {
    "test_attention",
    "test_attention_scores",
    "test_cross_entropy",
    "test_expert_linear",
    "test_matmul_sum",
    *LINEARS,
}


def pytest_collection_modifyitems(items):
    """Ops that have no products that "wide" would change, or no kernels of an instruction set's own, run once."""
    here = Path(__file__).parent

    def same(item):
        asked = item.callspec.params.get("path") if hasattr(item, "callspec") else None
        only = {"wide": LINEARS, "avx512_bf16": PAIRS}.get(asked)
        return only is not None and item.path.parent == here and item.path.stem not in only

    items[:] = [item for item in items if not same(item)]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if request.param == "reference":
        with force_path("reference"):
            yield "reference"
        return
    engine = _native.module()
    if request.param == "wide":
        request.getfixturevalue("wide_sums")
    else:
        engine.set_isa(request.param)
        monkeypatch.setattr("inlay.ops.matmul_sum.MANY", 1)  # where products are packed, few rows are, too
    with force_path("native"):
        yield request.param
    engine.set_isa("")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
