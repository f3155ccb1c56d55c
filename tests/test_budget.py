"""Budget: what it chooses keeps to the memory and speed it was given, and is worth the most of what does."""

from __future__ import annotations

import copy

import pytest
import torch
from families import BY_NAME, llama, text_batch

import inlay
from inlay.budget import Budget, _deepest, bytes_of

DATA = [text_batch(seed) for seed in range(2)]


def build():
    return llama(num_hidden_layers=3, hidden_size=64, intermediate_size=128, vocab_size=256)


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    """Three kinds of pieces instead of eight: an estimate takes a while."""
    kinds = Budget._kinds
    monkeypatch.setattr(Budget, "_kinds", lambda self, model: [kinds(self, model)[place] for place in (1, 4, -1)])


@pytest.fixture(scope="module")
def peak():
    """Of full fine-tuning, of which all but some 30 MB is runtime in a model this small."""
    return inlay.estimate(build(), inlay.Full(), batch=2, seq=64).peak


def test_it_keeps_to_the_memory_and_more_is_never_worth_less(peak):
    model, worth = build(), []
    before = copy.deepcopy(model.state_dict())
    for share in (0.97, 0.99, 1.1):
        budget = Budget(memory=int(share * peak), batch=2, seq=64)
        found = [choice for choice in budget.choices(model, DATA) if budget._fits(choice)]
        assert found and all(choice.estimate.peak <= share * peak for choice in found)
        worth.append(max(choice.value for choice in found))
    assert worth == sorted(worth) and worth[-1] > worth[0]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_too_little_memory_is_told_what_would_do(peak):
    with pytest.raises(ValueError, match=r"nothing fits into 0.00 GiB above the model at 2 x 64 tokens; the least"):
        Budget(memory=1000, batch=2, seq=64).settled(build(), DATA)


def test_with_everything_it_trains_everything(capsys):
    method = Budget(memory="64 GiB", batch=1, seq=16).settled(build(), DATA)
    assert isinstance(method, inlay.FreezeLayers) and method.layers == 3
    assert "inlay: Budget of 64.00 GiB" in capsys.readouterr().out


def test_speed_counts_too():
    with pytest.raises(ValueError, match=r"nothing fits into [\d,]+ tokens/s at 1 x 32 tokens; the least that trains"):
        Budget(tokens_per_second=1e12, batch=1, seq=32).settled(build(), DATA)


def test_tuning_and_files_speak_of_the_choice(tmp_path):
    model = inlay.tune(build(), Budget(memory="1 GiB", batch=1, seq=16), calibration=DATA).train()
    loss = model(**DATA[0]).loss
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.save_pretrained(tmp_path)
    loaded = inlay.load(build(), tmp_path)
    assert torch.equal(loaded(**DATA[0]).loss, model(**DATA[0]).loss)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_other_families(name):
    family = BY_NAME[name]
    choices = Budget(memory="1 GiB", batch=2, seq=8).choices(family.build(), [family.batch(0)])
    assert len(choices) == 3 and all(choice.value > 0 for choice in choices)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="wanted memory=, tokens_per_second= or both"):
        Budget()
    with pytest.raises(ValueError, match="wanted bytes, or text such as"):
        Budget(memory="lots")
    with pytest.raises(ValueError, match="calibration batches with labels"):
        inlay.tune(build(), Budget(memory="1 GiB"))
    with pytest.raises(ValueError, match="Budget chooses by data"):
        inlay.estimate(build(), Budget(memory="1 GiB"))
    with pytest.raises(ValueError, match="a speed above 0"):
        Budget(tokens_per_second=0)
    assert bytes_of("1.5 GiB") == 3 << 29 and bytes_of("800MB") == 800_000_000 and bytes_of(5) == 5


@pytest.mark.parametrize("limit", range(12))
def test_bisection(limit):
    assert _deepest(9, lambda count: count <= limit) == max(1, min(9, limit))
