"""Projections of one input are computed together only where nobody could tell, but by the time it takes."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from families import BY_NAME, llama, text_batch
from torch import nn

import inlay
from inlay.nn.stack import linears_of, part_of

METHODS = {
    "s2ft": lambda: inlay.S2FT(ratio=0.2),
    "s2ft on q": lambda: inlay.S2FT(ratio=0.2, target_modules=["q_proj", "gate_proj"]),
    "lora": lambda: inlay.LoRA(r=4),
    "lora on v": lambda: inlay.LoRA(r=4, target_modules=["v_proj", "up_proj"]),
}


def names(output):
    """Names of the autograd nodes behind a loss."""
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return [node.name() for node in seen]


def randomize(model):
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return model


@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_stacking_changes_no_loss_and_no_gradient(family, method, base, monkeypatch):
    model = randomize(inlay.tune(BY_NAME[family].build(), METHODS[method](), base=base)).train()
    batch = BY_NAME[family].batch(0)

    def run():
        model.zero_grad()
        loss = model(**batch).loss
        nodes = names(loss)
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, nodes

    loss, gradients, nodes = run()
    assert any("StackedLinear" in node for node in nodes)
    for module in ("attention", "blocks"):
        monkeypatch.setattr(f"inlay.nn.{module}.linears_of", lambda x, modules, apart=False: [m(x) for m in modules])
    alone, alone_gradients, nodes = run()
    assert not any("StackedLinear" in node for node in nodes)
    assert loss == pytest.approx(alone, rel=1e-6) and gradients.keys() == alone_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, alone_gradients[name], atol=1e-6, rtol=2e-5, what=name)  # fp32 sums in another order


def test_what_is_not_a_frozen_linear_is_called_as_it_is():
    linear = nn.Linear(4, 3)
    assert part_of(linear) is None  # it trains
    linear.requires_grad_(False)
    assert part_of(linear) is not None
    handle = linear.register_forward_hook(lambda *args: None)
    assert part_of(linear) is None
    handle.remove()
    assert part_of(linear) is not None

    class Other(nn.Linear):
        pass

    assert part_of(Other(4, 3).requires_grad_(False)) is None


def test_dropout_disabled_and_several_adapters_go_one_by_one():
    model = inlay.tune(llama(), inlay.LoRA(r=2, lora_dropout=0.5))
    q_proj = model.model.layers[0].self_attn.q_proj
    assert part_of(q_proj) is None and part_of(q_proj.eval()) is not None
    with inlay.disabled(model):
        assert part_of(q_proj) is None
    inlay.tune(model, inlay.LoRA(r=2), adapter_name="other")
    assert part_of(q_proj) is None


def test_hooks_on_a_projection_still_fire():
    model = inlay.tune(llama(), inlay.LoRA(r=2)).train()
    calls = []
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *args: calls.append(1))
    model(**text_batch(0)).loss.backward()
    assert calls == [1]


def test_without_gradients_nothing_is_stacked(monkeypatch):
    monkeypatch.setattr("inlay.nn.stack.stacked_linear", None)  # a call would raise
    linear = nn.Linear(4, 3).requires_grad_(False)
    with torch.no_grad():
        assert linears_of(torch.randn(2, 4, requires_grad=True), [linear])[0].shape == (2, 3)
    assert linears_of(torch.randn(2, 4), [linear])[0].grad_fn is None
