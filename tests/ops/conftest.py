"""`path`: runs a test on the plain-torch reference and on every instruction set this machine has."""

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
    PATHS += _native.module().available_isas()


@pytest.fixture(params=PATHS)
def path(request):
    if request.param == "reference":
        with force_path("reference"):
            yield "reference"
        return
    engine = _native.module()
    engine.set_isa(request.param)
    with force_path("native"):
        yield request.param
    engine.set_isa("")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
