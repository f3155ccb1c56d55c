"""Choices that look at gradients hold one of them at a time, and find what all of them at once would show."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from comparing import assert_equal
from families import BY_NAME, FAMILIES, llama, text_batch
from torch import nn

import inlay
from inlay.bases.linear import is_conv1d, is_linear, out_in_view
from inlay.budget import _weigh
from inlay.select.gradient import gradient_scores
from inlay.select.trial import loss_of, train_some, trial
from inlay.sites import block_of, blocks_of

DATA = [text_batch(seed) for seed in (900, 901)]


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_linear(module)}


class Live:
    """The most bytes of gradients of weights that were alive at once."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[weakref.ref] = []
        self.peak, self.largest = 0, 0
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.look)

    def look(self, parameter: torch.Tensor) -> None:
        self.seen = [held for held in self.seen if held() is not None]
        self.seen.append(weakref.ref(parameter.grad))
        self.peak = max(self.peak, sum(grad.nbytes for held in self.seen if (grad := held()) is not None))
        self.largest = max(self.largest, parameter.grad.nbytes)


CHOICES = {
    "s2ft": lambda: inlay.S2FT(ratio=0.5, strategy="gradient", target_modules="all-linear"),
    "neft": lambda: inlay.NeFT(ratio=0.1, probe_steps=3),
    "subtuning": lambda: inlay.SubTuning(layers=1, probe_steps=12, probe_lr=3e-3),
    "budget": lambda: inlay.Budget(memory="1 GiB", batch=2, seq=8),
}


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("build", [llama, BY_NAME["gpt2"].build], ids=["llama", "gpt2"])
def test_no_two_gradients_are_alive_at_once(build, kind):
    model = build()
    live = Live(model)
    inlay.tune(model, CHOICES[kind](), calibration=[*DATA, DATA[0]])
    assert live.peak == live.largest > 0


def test_the_watch_would_see_two():
    model = llama()
    live = Live(model)
    model(**DATA[0]).loss.backward()
    assert live.peak > 4 * live.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in ("mixtral",)], ids=str)
def test_scores_are_those_of_gradients_that_are_kept(family, dtype):
    model = family.build().to(dtype)
    batches = [_in_dtype(family.batch(seed), dtype) for seed in (900, 901)]
    linears = linears_of(model)
    sides = {name: ("in", "out")[place % 2] for place, name in enumerate(linears)}
    found = gradient_scores(model, sides, batches)
    model.eval().requires_grad_(False)
    for module in linears.values():
        module.weight.requires_grad_(True)
    wanted: dict[str, torch.Tensor] = {}
    for batch in batches:
        model.zero_grad()
        loss_of(model, batch).backward()
        for name, module in linears.items():
            grad = module.weight.grad.t() if is_conv1d(module) else module.weight.grad
            norms = torch.linalg.vector_norm(grad.float(), dim=0 if sides[name] == "in" else 1)
            wanted[name] = wanted.get(name, 0) + norms
    assert found.keys() == wanted.keys()
    for name in found:
        assert found[name].dtype == torch.float32 and found[name].shape == wanted[name].shape
        assert torch.allclose(found[name], wanted[name], rtol=1e-5, atol=0), name


def _in_dtype(batch, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def test_one_batch_scores_as_the_norm_of_its_gradient():
    """What one batch says does not depend on how it is counted: the sum of one norm is the norm of one sum."""
    model = llama()
    found = gradient_scores(model, {"model.layers.0.mlp.up_proj": "out"}, DATA[:1])
    model.eval()
    model(**DATA[0]).loss.backward()
    wanted = model.model.layers[0].mlp.up_proj.weight.grad.square().sum(1).sqrt()
    assert torch.allclose(found["model.layers.0.mlp.up_proj"], wanted, rtol=1e-5, atol=0)


def test_weights_of_one_memory_are_scored_under_each_name():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    found = gradient_scores(model, dict.fromkeys(names, "out"), DATA)
    assert_equal(found[names[0]], found[names[1]], "tied")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_trial_that_steps_in_the_backward_is_the_trial_that_steps_after_it(dtype):
    """Bit for bit: AdamW treats each tensor on its own."""
    model = llama(tie_word_embeddings=True).to(dtype)
    keys = [name for name, _ in model.named_parameters()]
    plain = copy.deepcopy(model).train()
    torch.manual_seed(0)
    optimizer = inlay.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, rounding="residual")
    for step in range(5):
        optimizer.zero_grad()
        plain(**DATA[step % 2]).loss.backward()
        optimizer.step()
    with trial(model, keys) as parameters:
        train_some(model, parameters.values(), DATA, 5, 1e-2)
        for key, wanted in plain.named_parameters():
            assert_equal(model.get_parameter(key).detach(), wanted.detach(), key)
            assert model.get_parameter(key).grad is None


def test_a_budget_weighs_as_with_gradients_that_are_kept():
    model = BY_NAME["gpt2"].build()
    energies, _ = _weigh(model, DATA)
    model.eval()
    wanted: dict[str, float] = {}
    for batch in DATA:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, module in linears_of(model).items():
            if block_of(name, blocks_of(model)):
                grad = module.weight.grad
                wanted[name] = wanted.get(name, 0.0) + float(grad.double().square().sum()) / len(DATA)
                assert energies[name].singular.numel() == min(*out_in_view(module).shape, 64)
    assert energies.keys() == wanted.keys()
    for name, total in wanted.items():
        assert abs(energies[name].total - total) <= 1e-5 * total, name
        assert abs(float(energies[name].singular.sum()) - total) <= 1e-3 * total, name
