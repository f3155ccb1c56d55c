"""Weighted sums of adapters, and swapping one adapter's values for another's in place."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch._dynamo.testing
from comparing import assert_close, assert_equal
from families import eval_logits, llama, text_batch
from oracle import deltas_of, randomize

import inlay
from inlay.state import tuned_linears

BATCH = text_batch(0)
METHODS = {
    "s2ft": lambda seed: inlay.S2FT(ratio=0.2, seed=seed),
    "s2ft, other linears": lambda seed: inlay.S2FT(
        ratio=0.2, seed=seed, target_modules=["q_proj", "down_proj"] if seed == 2 else None
    ),
    "lora": lambda seed: inlay.LoRA(r=2 + seed, lora_alpha=8, seed=seed),
    "lora, other linears": lambda seed: inlay.LoRA(r=4, seed=seed, target_modules=["q_proj"] if seed == 2 else None),
}


def with_two(kind, base=None):
    model = inlay.tune(llama(), METHODS[kind](1), adapter_name="first", base=base)
    inlay.tune(model, METHODS[kind](2), adapter_name="second")
    for seed, name in enumerate(("first", "second")):
        model.set_adapter(name)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return model


@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("kind", METHODS)
def test_the_sum_is_exact_and_survives_saving(kind, base, tmp_path):
    model = with_two(kind, base)
    parts = {name: deltas_of(model, name) for name in ("first", "second")}
    model.add_weighted_adapter(["first", "second"], [0.7, -1.5], "sum")
    assert model.active_adapters() == ["second"]
    made = deltas_of(model, "sum")
    assert made.keys() == parts["first"].keys() | parts["second"].keys()
    for path, delta in made.items():
        wanted = sum(
            weight * parts[name][path].weight_delta()
            for name, weight in (("first", 0.7), ("second", -1.5))
            if path in parts[name]
        )
        assert_close(delta.weight_delta(), wanted, atol=1e-6, what=path)
    model.set_adapter("sum")
    logits = eval_logits(model, BATCH)
    model.save_pretrained(tmp_path)
    assert_equal(eval_logits(inlay.load(llama(), tmp_path, base=base), BATCH), logits, "reloaded")


def test_the_sum_can_be_trained_and_exported(tmp_path):
    model = with_two("s2ft")
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    model.train()(**BATCH).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained and all(".deltas.sum." in name for name in trained)
    inlay.export(model, tmp_path)


def test_what_cannot_be_added_up_is_refused():
    model = with_two("s2ft")
    with pytest.raises(ValueError, match="wanted one weight per adapter, got 2 adapters and 1 weights"):
        model.add_weighted_adapter(["first", "second"], [1.0], "sum")
    with pytest.raises(ValueError, match="no adapter 'third'"):
        model.add_weighted_adapter(["first", "third"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="an adapter 'first' already"):
        model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "first")
    inlay.tune(model, inlay.LoRA(r=2), adapter_name="lora")
    with pytest.raises(ValueError, match=r"adapters of one kind .* \['LoRA', 'S2FT'\]"):
        model.add_weighted_adapter(["first", "lora"], [1.0, 1.0], "sum")
    alone = inlay.tune(llama(), inlay.S2FT(ratio=0.2, update="in_place"))
    with pytest.raises(ValueError, match="part of its base weight; merge it"):
        alone.add_weighted_adapter(["default"], [2.0], "twice")


@pytest.mark.parametrize(
    ("method", "base"),
    [
        (lambda seed: inlay.S2FT(ratio=0.2, seed=seed), None),
        (lambda seed: inlay.S2FT(ratio=0.2, seed=seed, update="in_place"), None),
        (lambda seed: inlay.S2FT(ratio=0.2, seed=seed, keep="exact"), "nf4"),
        (lambda seed: inlay.LoRA(r=4, seed=seed), "nf4"),
    ],
    ids=["s2ft", "in place", "exact", "lora"],
)
def test_hotswap_keeps_every_tensor_where_it_is(method, base, tmp_path):
    wanted = {}
    for seed in (1, 2):
        tuned = inlay.tune(llama(), method(seed), base=base)
        with torch.no_grad():
            for delta in deltas_of(tuned).values():
                for parameter in delta.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        wanted[seed] = eval_logits(tuned, BATCH)
        tuned.save_pretrained(tmp_path / str(seed))
    model = inlay.load(llama(), tmp_path / "1", base=base)
    held = {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}
    for seed in (2, 1, 2):
        model.hotswap_adapter(tmp_path / str(seed))
        assert_close(eval_logits(model, BATCH), wanted[seed], atol=1e-6, what=f"seed {seed}")
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()} == held


def test_hotswap_refuses_what_does_not_fit_and_changes_nothing(tmp_path):
    for name, ratio in (("small", 0.2), ("large", 0.5)):
        tuned = inlay.tune(llama(), inlay.S2FT(ratio=ratio))
        randomize(tuned, 0.1)
        tuned.save_pretrained(tmp_path / name)
    lora = inlay.tune(llama(), inlay.LoRA(r=2))
    randomize_lora(lora)
    lora.save_pretrained(tmp_path / "lora")
    model = inlay.load(llama(), tmp_path / "small")
    before = eval_logits(model, BATCH)
    with pytest.raises(ValueError, match="wanted a SubmatrixDelta with tensors"):
        model.hotswap_adapter(tmp_path / "large")
    with pytest.raises(ValueError, match="wanted S2FT on the same .* modules to swap in, got LoRA"):
        model.hotswap_adapter(tmp_path / "lora")
    with pytest.raises(ValueError, match="no adapter 'x'"):
        model.hotswap_adapter(tmp_path / "small", "x")
    assert_equal(eval_logits(model, BATCH), before, "logits")


def randomize_lora(model):
    with torch.no_grad():
        for linear in tuned_linears(model).values():
            for delta in linear.deltas.values():
                delta.lora_B.normal_(generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("method", [inlay.S2FT(ratio=0.2), inlay.LoRA(r=4)], ids=["s2ft", "lora"])
def test_hotswap_does_not_recompile(method, base, tmp_path):
    wanted = {}
    for seed in (1, 2):
        tuned = inlay.tune(llama(), dataclasses.replace(method, seed=seed), base=base)
        with torch.no_grad():
            for delta in deltas_of(tuned).values():
                for parameter in delta.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        wanted[seed] = eval_logits(tuned, BATCH)
        tuned.save_pretrained(tmp_path / str(seed))
    model = inlay.load(llama(), tmp_path / "1", base=base).eval()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    inputs = {key: BATCH[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert_close(compiled(**inputs, use_cache=False).logits, wanted[1], atol=1e-5, what="first")
        compilations = counter.frame_count
        model.hotswap_adapter(tmp_path / "2")
        assert_close(compiled(**inputs, use_cache=False).logits, wanted[2], atol=1e-5, what="second")
    assert counter.frame_count == compilations > 0
