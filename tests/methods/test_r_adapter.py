"""R-Adapter: what is dropped in training, what is averaged, and what is used and merged."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close, assert_equal
from families import BY_NAME, eval_logits, llama, text_batch
from methods import shake, trainables
from torch import nn

import inlay
from inlay.pieces.linear.output_adapter import AveragedFullOutputAdapter, AveragedOutputAdapter, OutputAdapter
from inlay.state import pieces_of

BATCHES = [text_batch(seed) for seed in range(4)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def piece_of(linear=None, **options):
    piece = OutputAdapter(linear or nn.Linear(6, 8), 3, **options)
    with torch.no_grad():
        piece.r_adapter_up.copy_(random(8, 3))
    return piece


def change_of(piece):
    return 0.1 * piece.r_adapter_up @ piece.r_adapter_down


def test_in_use_it_is_scaled_down():
    piece, y = piece_of(eval_scale=0.5), random(2, 5, 8, seed=1)
    assert_close(piece.train().after(y, None), y + y @ change_of(piece).T, atol=1e-6, what="training")
    assert_close(piece.eval().after(y, None), y + 0.5 * y @ change_of(piece).T, atol=1e-6, what="in use")


def test_samples_are_dropped_whole():
    piece, y = piece_of(drop_path=0.25).train(), random(400, 3, 8, seed=1)
    torch.manual_seed(0)
    change = piece.after(y, None) - y
    full = y @ change_of(piece).T / 0.75
    dropped = change.abs().amax(dim=(1, 2)) == 0
    assert 60 < int(dropped.sum()) < 140
    assert_close(change[~dropped], full[~dropped], atol=1e-5, what="the others")


@pytest.mark.parametrize("training", [True, False])
def test_merged_is_what_is_used(training):
    linear, x = nn.Linear(6, 8), random(4, 6, seed=2)
    piece = piece_of(linear, drop_path=0.5, eval_scale=0.3).eval()
    wanted = piece.after(linear(x), x)
    weight, bias = piece.train(training).merge(linear.weight, linear.bias)
    assert_close(x @ weight.T + bias, wanted, atol=1e-6, what="merged")


def steps(model, optimizer, batches, seen=None):
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        if seen is not None:
            seen.append({name: p.detach().clone() for name, p in trainables(model).items()})


@pytest.mark.parametrize("r, kind", [(4, AveragedOutputAdapter), (32, AveragedFullOutputAdapter)])
def test_the_average_follows_each_step_and_is_what_is_used(r, kind):
    tuned = inlay.tune(llama(), inlay.RAdapter(r=r, ema=0.6, drop_path=0.0)).train()
    assert {type(piece) for piece in pieces_of(tuned, "default").values()} == {kind}
    wanted = {name: p.detach().clone() for name, p in trainables(tuned).items()}
    seen: list = []
    steps(tuned, torch.optim.AdamW(trainables(tuned).values(), lr=1e-2), BATCHES, seen)
    for values in seen:
        wanted = {name: 0.6 * average + 0.4 * values[name] for name, average in wanted.items()}
    buffers = dict(tuned.named_buffers())
    for name, average in wanted.items():
        assert_close(buffers[f"{name}_average"], average, atol=1e-6, what=name)
    used = eval_logits(tuned, BATCHES[0])
    with torch.no_grad():
        for parameter in trainables(tuned).values():
            parameter.add_(1.0)
    assert_equal(eval_logits(tuned, BATCHES[0]), used, "what trains is not what is used")
    assert_close(eval_logits(inlay.merge(tuned), BATCHES[0]), used, atol=1e-5, what="merged")
    assert float((eval_logits(llama(), BATCHES[0]) - used).abs().max()) > 1e-4


def test_it_resumes_bit_for_bit(tmp_path):
    options = {"r": 4, "ema": 0.5, "drop_path": 0.0}
    straight = inlay.tune(llama(), inlay.RAdapter(**options)).train()
    steps(straight, torch.optim.SGD(trainables(straight).values(), lr=0.1), BATCHES)
    first = inlay.tune(llama(), inlay.RAdapter(**options)).train()
    steps(first, torch.optim.SGD(trainables(first).values(), lr=0.1), BATCHES[:2])
    first.save_pretrained(tmp_path)
    second = inlay.load(llama(), tmp_path).train()
    assert_equal(eval_logits(second, BATCHES[0]), eval_logits(first, BATCHES[0]), "loaded")
    steps(second, torch.optim.SGD(trainables(second).values(), lr=0.1), BATCHES[2:])
    wanted = straight.state_dict()
    for key, tensor in second.state_dict().items():
        assert_equal(tensor, wanted[key], key)


def test_exported_it_is_what_is_used(tmp_path):
    peft = pytest.importorskip("peft")
    tuned = inlay.tune(llama(), inlay.RAdapter(r=4, ema=0.5, drop_path=0.0)).train()
    steps(tuned, torch.optim.SGD(trainables(tuned).values(), lr=1.0), BATCHES)
    inlay.export(tuned, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert_close(eval_logits(theirs, BATCHES[0]), eval_logits(tuned, BATCHES[0]), atol=1e-5, what="logits")
    biased = shake(inlay.tune(BY_NAME["opt"].build(), inlay.RAdapter(r=4)))
    with pytest.raises(ValueError, match="is no exact LoRA; merge it instead"):
        inlay.export(biased, tmp_path / "biased")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r: wanted a rank of 1 or more"),
        ({"drop_path": 1.0}, r"drop_path: wanted a number in \[0, 1\)"),
        ({"ema": -0.1}, r"ema: wanted a number in \[0, 1\)"),
        ({"eval_scale": 0.0}, "eval_scale: wanted a number in"),
    ],
)
def test_what_cannot_be_meant(options, message):
    with pytest.raises(ValueError, match=message):
        inlay.RAdapter(**options)
