"""compute="int8": frozen products of the blocks in 8 bits."""

import copy

import pytest
import torch
from families import BY_NAME
from torch import nn

import inlay
from inlay import _native
from inlay.nn.int8 import Int8Linear
from inlay.nn.tuned_linear import TunedLinear
from inlay.ops.int8_products import Int8Products, Int8ProductsT
from inlay.ops.matmul_sum import ISA

HERE = _native.available() and _native.module().isa() == ISA
needs_bytes = pytest.mark.skipif(not HERE, reason=f"this CPU is not {ISA}")
QUICK = ("llama", "gpt2", "gemma2", "qwen3_5")


def tiny(name="llama", dtype=torch.bfloat16):
    torch.manual_seed(0)
    return BY_NAME[name].build().to(dtype)


def batch(model, rows=4, width=16):
    return torch.randint(0, model.config.vocab_size, (rows, width), generator=torch.Generator().manual_seed(1))


def losses(model, steps=12, lr=2e-3):
    tokens = batch(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = inlay.optim.AdamW(trained, lr=lr, rounding="residual")
    model.train()
    found = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@needs_bytes
@pytest.mark.parametrize("make", [lambda: inlay.S2FT(ratio=0.2), lambda: inlay.LoRA(r=4), lambda: inlay.LNTuning()])
@pytest.mark.parametrize("family", QUICK)
def test_trains_to_the_same_loss(family, make, monkeypatch):
    for least in ("MANY", "MANY_BYTES"):
        monkeypatch.setattr(f"inlay.ops.matmul_sum.{least}", 1)
    plain = tiny(family)
    exact = inlay.tune(copy.deepcopy(plain), make())
    ours = inlay.tune(plain, make(), compute="int8")
    wanted, got = losses(exact), losses(ours)
    assert wanted[-1] < wanted[0]
    assert got != wanted, "nothing was computed in 8 bits"
    # steps of linear attention drift apart in bf16 by themselves, which is what the family's slack says
    assert max(abs(a - b) / b for a, b in zip(got, wanted)) < 0.003 * BY_NAME[family].slack


@needs_bytes
def test_what_computes_in_8_bits(monkeypatch):
    monkeypatch.setattr("inlay.nn.int8.LEAST", 1)
    model = inlay.tune(tiny(), inlay.S2FT(ratio=0.2), compute="int8")
    tuned = [m for m in model.modules() if isinstance(m, TunedLinear)]
    plain = [m for m in model.modules() if type(m).__name__ == "Linear" and not isinstance(m, TunedLinear)]
    assert tuned and all(m.base is Int8Products for m in tuned)
    assert {isinstance(m, Int8Linear) for m in plain if m is not model.lm_head} == {True}
    assert not isinstance(model.lm_head, Int8Linear)
    assert isinstance(plain[0], nn.Linear), "its class stays"


@needs_bytes
def test_conv1d_and_narrow_weights(monkeypatch):
    model = inlay.tune(tiny("gpt2"), inlay.LoRA(r=2), compute="int8")
    tuned = [m for m in model.modules() if isinstance(m, TunedLinear)]
    assert tuned and all(m.base is Int8ProductsT for m in tuned)
    monkeypatch.setattr("inlay.nn.int8.LEAST", 10**6)
    model = inlay.tune(tiny("gpt2"), inlay.LoRA(r=2), compute="int8")
    assert not any(m.base is Int8ProductsT for m in model.modules() if isinstance(m, TunedLinear))


@needs_bytes
def test_weights_that_train_are_multiplied_as_they_are(monkeypatch):
    for least in ("MANY", "MANY_BYTES"):
        monkeypatch.setattr(f"inlay.ops.matmul_sum.{least}", 1)
    found = []
    for compute in (None, "int8"):
        model = inlay.tune(tiny(), inlay.Full(), compute=compute).train()
        tokens = batch(model)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append((float(loss.detach()), [p.grad for p in model.parameters() if p.grad is not None]))
    assert found[0][0] == found[1][0] and len(found[0][1]) == len(found[1][1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))
    model = inlay.tune(tiny(), inlay.S2FT(ratio=0.2), compute="int8")
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    tokens = batch(model)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert weight.grad is not None and bool(weight.grad.any())


@needs_bytes
def test_nothing_of_it_is_left_in_merged_models_and_adapters(tmp_path):
    model = inlay.tune(tiny(), inlay.S2FT(ratio=0.2), compute="int8")
    losses(model, steps=2)
    model.save_pretrained(tmp_path)
    tokens = batch(model)
    loaded = inlay.load(tiny(), tmp_path)
    merged = inlay.merge(copy.deepcopy(model))
    assert not any(isinstance(m, Int8Linear) for m in [*merged.modules(), *loaded.modules()])
    with torch.no_grad():
        wanted, got = loaded.eval()(tokens).logits, merged.eval()(tokens).logits
    assert float((wanted - got).float().norm() / wanted.float().norm()) < 0.02


@needs_bytes
def test_a_second_adapter_computes_as_the_first(tmp_path):
    model = inlay.tune(tiny(), inlay.LoRA(r=2, target_modules=["q_proj"]), compute="int8")
    inlay.tune(model, inlay.LoRA(r=2, target_modules=["gate_proj"]), adapter_name="second")
    assert model.model.layers[0].mlp.gate_proj.base is Int8Products
    other = inlay.tune(tiny("gpt2"), inlay.LoRA(r=2, target_modules=["c_attn"]), compute="int8")
    inlay.tune(other, inlay.LoRA(r=2, target_modules=["c_attn", "c_fc"]), adapter_name="second", compute="int8")
    bases = [m.base for m in other.modules() if isinstance(m, TunedLinear)]
    assert len(bases) == 4 and set(bases) == {Int8ProductsT}


def test_refusals():
    model = tiny()
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match="compute: wanted \"int8\" or None, got 'fp8'"):
        inlay.tune(model, inlay.LoRA(r=2), compute="fp8")
    with pytest.raises(ValueError, match="leave one of the two out"):
        inlay.tune(model, inlay.LoRA(r=2), base="nf4", compute="int8")
    if HERE:
        with pytest.raises(ValueError, match="wanted a bfloat16 model on the CPU, got torch.float32"):
            inlay.tune(tiny(dtype=torch.float32), inlay.LoRA(r=2), compute="int8")
        packed = inlay.tune(tiny(), inlay.LoRA(r=2), base="nf4")
        with pytest.raises(ValueError, match="wanted dense weights, got packed ones"):
            inlay.tune(packed, inlay.LoRA(r=2), compute="int8", adapter_name="other")
        _native.module().set_isa("avx2")
    try:
        with pytest.raises(ValueError, match=f"wanted a CPU that multiplies bytes and pairs of bf16 .{ISA}., got"):
            inlay.tune(model, inlay.LoRA(r=2), compute="int8")
    finally:
        if _native.available():
            _native.module().set_isa("")
    assert before == {name: type(m) for name, m in model.named_modules()}
