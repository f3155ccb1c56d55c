"""torch.compile of a model with a head that trains whole: one graph, the same numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from comparing import assert_close
from families import class_batch

import inlay

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
from test_modules_to_save import classifier


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph(dtype):
    torch._dynamo.reset()
    tuned = inlay.tune(classifier(dtype=dtype), inlay.S2FT(ratio=0.2))
    assert torch._dynamo.explain(tuned)(**class_batch(0)).graph_break_count == 0
    tuned(**class_batch(0)).loss.backward()
    wanted = tuned.score.weight.grad.clone()
    tuned.zero_grad()
    torch.compile(tuned, backend="aot_eager")(**class_batch(0)).loss.backward()
    bound = 1e-5 if dtype is torch.float32 else 0.05
    assert_close(tuned.score.weight.grad, wanted, atol=bound, what="gradient of the head")
