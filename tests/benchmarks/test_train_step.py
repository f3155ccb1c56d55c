"""What the benchmark of a training step compares: batches of real lengths, PaCA in plain torch, the floor."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from families import llama
from torch import nn

import inlay
from inlay import _native
from inlay.integrations.padding_free import row_width

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """A module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name):
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


def test_the_demos_lengths_are_those_of_all_its_words():
    rows = json.loads((BENCHMARKS / "lengths_demo.json").read_text())
    assert sum(samples for _, _, samples in rows) == 9600
    assert all(0 < supervised < total <= 64 for total, supervised, _ in rows)


def test_all_methods_get_the_same_samples(bench):
    lengths = bench("_lengths")
    steps = lengths.draw("demo", 8, 5, 97)
    assert len(steps) == 5 and steps == lengths.draw("demo", 8, 5, 97)
    for samples in steps:
        peers, ours = lengths.padded(samples), lengths.as_finetune(samples)
        assert lengths.real_tokens(peers) == lengths.real_tokens(ours) == sum(len(s["input_ids"]) for s in samples)
        assert peers["input_ids"].shape[1] == max(len(s["input_ids"]) for s in samples)
        assert torch.equal((peers["labels"] != -100).sum(1), (ours["labels"] != -100).sum(1))
        assert bool((peers["labels"][peers["attention_mask"] == 0] == -100).all())


@pytest.mark.skipif(not _native.available(), reason="without the native module padding stays")
def test_ours_run_without_padding_and_with_the_peers_loss(bench):
    lengths = bench("_lengths")
    samples = lengths.draw("demo", 4, 1, 97)[0]
    plain = llama()
    wanted = plain(**lengths.padded(samples)).loss
    model = inlay.tune(plain, inlay.S2FT(ratio=0.1)).train()
    loss = model(**lengths.as_finetune(samples)).loss
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    computed = model.inlay_state.padding_free.computed
    assert computed == row_width(sum(len(s["input_ids"]) for s in samples))


def test_plain_paca_has_the_dense_gradients_columns(bench):
    paca = bench("_paca")
    model = llama()
    channels = paca.channels_of_s2ft(model, 0.25)
    tuned = ("self_attn.o_proj", "mlp.down_proj")
    assert set(channels) == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in tuned}
    dense = llama()
    paca.install(model, channels)
    ids = torch.randint(3, 97, (2, 9))
    loss, wanted = model(input_ids=ids, labels=ids).loss, dense(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, wanted)
    loss.backward(), wanted.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(channels)
    for name, count in channels.items():
        module = model.get_submodule(name)
        assert module.values.shape[1] == count
        want = dense.get_submodule(name).weight.grad[:, module.columns]
        torch.testing.assert_close(module.values.grad, want, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        module.values += 1.0
    assert not torch.allclose(model(input_ids=ids, labels=ids).loss, loss)


def test_pefts_paca_is_asked_of_a_peft_that_has_it(bench):
    peft = pytest.importorskip("peft")
    if hasattr(peft, "PacaConfig"):
        built = bench("_methods").peft_paca(llama())
        assert any(parameter.requires_grad for parameter in built.model.parameters())
    else:
        with pytest.raises(SystemExit, match="wanted a PEFT with PacaConfig"):
            bench("_methods").peft_paca(llama())


def test_the_floor_counts_attentions_products_at_the_rate_of_the_linears(bench):
    measure = bench("_floor")
    flops = measure.attention_flops([3, 5], heads=2, width=4)
    seen = torch.ones(3, 3).tril().sum() + torch.ones(5, 5).tril().sum()
    assert flops == 6 * 2 * float(seen) * 2 * 4
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 500}
    seconds, rate = measure.floor(shape, [30, 20], 10, torch.float32, "cpu")
    weights = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    assert rate == pytest.approx(3 * 4 * 50 * weights / seconds["linears"])
    assert seconds["attention"] == pytest.approx(3 * measure.attention_flops([30, 20], 4, 16) / rate)
    assert seconds["loss_products"] > 0


def test_every_instruction_set_holds_every_library(bench):
    step = bench("train_step")
    assert {name: values[0] for name, values in step.ISAS.items()} == {name: name for name in step.ISAS}
    assert all(len(values) == len(step.ISA_VARIABLES) for values in step.ISAS.values())


def test_a_frozen_linear_with_a_bias(bench):
    linear = nn.Linear(6, 4)
    partial = bench("_paca").PartialLinear(linear, torch.tensor([1, 4]))
    x = torch.randn(3, 6, requires_grad=True)
    torch.testing.assert_close(partial(x), nn.functional.linear(x, linear.weight, linear.bias))
