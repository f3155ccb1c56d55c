"""Tuned models compile as one graph, and train in it as they do without."""

import shutil

import families
import pytest
import torch
from comparing import assert_series

import inlay

METHODS = {
    "s2ft": lambda: inlay.S2FT(ratio=0.25),
    "s2ft-out": lambda: inlay.S2FT(ratio=0.25, target_modules=["q_proj", "up_proj"]),
    "lora": lambda: inlay.LoRA(r=4),
}
STEPS = 3


def tuned(method, base):
    return inlay.tune(families.llama(), METHODS[method](), base=base).train()


def losses(model, step):
    """A few steps of AdamW on batches of one shape."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    series = []
    for seed in range(STEPS):
        tokens = families.prompt(seed, tokens=9, rows=2)
        loss = step(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        series.append(float(loss.detach()))
    return series


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("base", [None, "nf4"], ids=["dense", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_one_graph_with_the_same_losses(method, base):
    plain, compiled = tuned(method, base), tuned(method, base)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    wanted = losses(plain, plain)
    assert wanted[-1] != wanted[0]
    assert_series(losses(compiled, step), wanted, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_graph_where_products_are_summed_as_on_a_gpu(method, wide_sums):
    test_one_graph_with_the_same_losses(method, "nf4")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default backend compiles C++ on a CPU")
def test_the_default_backend():
    plain, compiled = tuned("s2ft", "nf4"), tuned("s2ft", "nf4")
    step = torch.compile(compiled, fullgraph=True)
    assert_series(losses(compiled, step), losses(plain, plain), rtol=1e-4)
