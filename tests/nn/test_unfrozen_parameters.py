"""What a user unfreezes beside a delta trains with the gradient of full autograd, whatever fused module it is in."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from families import BY_NAME, llama, text_batch

import inlay
from inlay.bases.quantized import QuantizedWeight


def biased_llama(**changes):
    return llama(attention_bias=True, mlp_bias=True, **changes)


METHODS = {
    "s2ft": lambda: inlay.S2FT(ratio=0.3),
    "s2ft of all": lambda: inlay.S2FT(ratio=0.3, target_modules="all-linear"),
    "s2ft in place": lambda: inlay.S2FT(ratio=0.3, update="in_place"),
    "lora": lambda: inlay.LoRA(r=2),
    "lora of some": lambda: inlay.LoRA(r=2, target_modules=["q_proj", "down_proj"]),
    "lora, dropout": lambda: inlay.LoRA(r=2, lora_dropout=0.3),
}
#: Of a parameter's name: kinds of parameters that may be unfrozen.
KINDS = {
    "biases": lambda name: name.endswith(".bias"),
    "norms": lambda name: "norm" in name,
    "weights": lambda name: name.endswith("proj.weight"),
    "head": lambda name: name == "lm_head.weight",
    "embeddings": lambda name: "embed_tokens" in name,
}


def full_gradients(model, batch):
    model.requires_grad_(True)
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def unfreeze(model, kind):
    chosen = {name: p for name, p in model.named_parameters() if KINDS[kind](name) and p.is_floating_point()}
    chosen = {name: p for name, p in chosen.items() if ".deltas." not in name}
    assert chosen
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def assert_trained(tuned, chosen, wanted, tolerance=2e-5):
    tuned(**text_batch(0)).loss.backward()
    for name, parameter in chosen.items():
        full = wanted[name]
        assert parameter.grad is not None, f"{name} got no gradient"
        assert_close(parameter.grad, full, atol=tolerance * float(full.abs().max()) + 1e-8, what=name)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_on_a_dense_base(method, kind, checkpointed):
    """Deltas are zero, and the values in place are the weights' own: the gradients are the base model's."""
    wanted = full_gradients(biased_llama(), text_batch(0))
    tuned = inlay.tune(biased_llama(), METHODS[method]())
    if checkpointed:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    chosen = unfreeze(tuned, kind)
    if method == "s2ft in place" and kind == "weights":
        wanted = {name: without_chosen(tuned, name, full) for name, full in wanted.items()}
    assert_trained(tuned, chosen, wanted)


def without_chosen(tuned, name, gradient):
    """The chosen channels of a weight are the delta's, which overwrites them: none of the gradient is theirs."""
    module = tuned.get_submodule(name.rpartition(".")[0]) if name.endswith("proj.weight") else None
    deltas = list(getattr(module, "deltas", {}).values())
    if not deltas:
        return gradient
    return gradient.index_fill(deltas[0].dim, deltas[0].s2ft_indices, 0.0)


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["biases", "norms", "head"])
@pytest.mark.parametrize("method", ["s2ft", "lora", "lora of some"])
def test_on_a_quantized_base(method, kind, base):
    tuned, eager = inlay.tune(biased_llama(), METHODS[method](), base=base), biased_llama()
    for name, module in tuned.named_modules():
        if isinstance(module, QuantizedWeight):
            eager.get_submodule(name).weight.data.copy_(module.weight)
    wanted = full_gradients(eager, text_batch(0))
    assert_trained(tuned, unfreeze(tuned, kind), wanted)


def test_packed_weights_cannot_train():
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.3), base="nf4")
    projection = tuned.model.layers[0].mlp.down_proj
    with pytest.raises(RuntimeError, match="floating point"):
        projection.packed.requires_grad_(True)
    projection.absmax.requires_grad_(True)
    with pytest.raises(TypeError, match="scales of a packed weight"):
        tuned(**text_batch(0))


@pytest.mark.parametrize("kind", ["biases", "weights"])
def test_several_adapters_and_none(kind):
    wanted = full_gradients(biased_llama(), text_batch(0))
    tuned = inlay.tune(biased_llama(), inlay.LoRA(r=2), adapter_name="one")
    inlay.tune(tuned, inlay.S2FT(ratio=0.2), adapter_name="two")
    tuned.set_adapter(["one", "two"])
    assert_trained(tuned, unfreeze(tuned, kind), wanted)
    tuned.zero_grad()
    with inlay.disabled(tuned):
        assert_trained(tuned, unfreeze(tuned, kind), wanted)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "opt", "bert", "t5", "qwen3"])
def test_every_parameter_of_a_family(family):
    """Everything is unfrozen: what the fused modules do not compute, autograd does."""
    build, batch = BY_NAME[family].build, BY_NAME[family].batch(0)
    wanted = full_gradients(build(), batch)
    tuned = inlay.tune(build(), inlay.S2FT(ratio=0.3))
    tuned.requires_grad_(True)
    tuned(**batch).loss.backward()
    for name, full in wanted.items():
        if full is not None:
            ours = tuned.get_parameter(name).grad
            assert ours is not None, f"{name} got no gradient"
            assert_close(ours, full, atol=2e-5 * float(full.abs().max()) + 1e-8, what=name)


def test_it_trains_to_the_same_weights():
    """A few steps of AdamW on norms, biases and the deltas do not stray from eager modules."""
    series = []
    for fused in (True, False):
        tuned = inlay.tune(biased_llama(), inlay.LoRA(r=2), fused_blocks=fused, fused_loss=fused)
        for kind in ("biases", "norms"):
            unfreeze(tuned, kind)
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
        for seed in range(4):
            optimizer.zero_grad()
            loss = tuned(**text_batch(seed)).loss
            loss.backward()
            optimizer.step()
        series.append(float(loss.detach()))
    assert abs(series[0] - series[1]) < 1e-4


@pytest.mark.parametrize("quantized", [False, True])
def test_a_bias_under_peft(quantized):
    from peft import LoraConfig, get_peft_model

    from inlay.bases import BaseConfig, quantize_linears
    from inlay.integrations.peft import S2FTConfig, accelerate_lora

    for config in (
        S2FTConfig(ratio=0.3, target_modules=["q_proj", "down_proj"]),
        accelerate_lora(LoraConfig(r=2, target_modules=["q_proj", "down_proj"])),
    ):
        base, eager = biased_llama(), biased_llama()
        if quantized:
            quantize_linears(base, BaseConfig("nf4"))
            for name, module in base.named_modules():
                if isinstance(module, QuantizedWeight):
                    eager.get_submodule(name).weight.data.copy_(module.weight)
        wanted = full_gradients(eager, text_batch(0))
        model = get_peft_model(base, config)
        chosen = {n: p for n, p in model.get_base_model().named_parameters() if n.endswith(".bias") and "lora" not in n}
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        assert_trained(model, chosen, {n: wanted[n.replace(".base_layer", "")] for n in chosen})
