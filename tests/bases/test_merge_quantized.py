"""Merging an adapter on a quantized base: into the dense originals, or dequantized with a warning; never four bits."""

import copy
import json
import warnings

import pytest
import torch
from comparing import assert_close, assert_equal, assert_state_equal, max_diff
from families import BY_NAME, eval_logits, llama, prompt, text_batch
from golden import GOLDEN
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertForSequenceClassification

import inlay
from inlay.adapters.originals import Originals
from inlay.bases import BaseConfig, QuantizedWeight, quantize_linears
from inlay.state import tuned_linears

LORA, S2FT = inlay.LoRA(r=4), inlay.S2FT(ratio=0.3)
EXACT = inlay.S2FT(ratio=0.3, keep="exact")


def shake(model, size=0.03):
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=random))
    return model


@pytest.fixture
def checkpoint(tmp_path):
    """A dense checkpoint in several shards, and the model in it."""
    model = llama()
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert (tmp_path / "dense/model.safetensors.index.json").exists()
    return tmp_path / "dense", model.eval()


def no_quantized_left(model):
    return not any(isinstance(m, QuantizedWeight) for m in model.modules())


@pytest.mark.parametrize("how", ["given", "recorded", "loaded quantized"])
@pytest.mark.parametrize("method", [LORA, S2FT, EXACT], ids=["lora", "s2ft", "exact"])
def test_into_the_originals(checkpoint, method, how, capsys):
    """The same weights as merging into the dense model; nothing of the quantization is left."""
    directory, dense = checkpoint
    if how == "loaded quantized":
        model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=inlay.QuantizationConfig())
        inlay.tune(model, method)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory) if how == "recorded" else copy.deepcopy(dense)
        inlay.tune(model, method, base="nf4")
    shake(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = inlay.merge(model, originals=directory if how == "given" else None, inputs={"input_ids": prompt()})
    said = capsys.readouterr().out
    assert "merged into the original weights of" in said and "max |Δlogit| against the quantized model" in said
    assert no_quantized_left(plain) and list(plain.state_dict()) == list(dense.state_dict())
    for name, module in tuned_linears(model).items():
        original = dense.get_submodule(name).weight
        merged = plain.get_submodule(name).weight
        delta = module.deltas["default"]
        assert_equal(merged, delta.merge(original.detach(), None)[0], name)
        if method is EXACT:
            assert_equal(merged[:, delta.s2ft_indices], delta.s2ft_values.detach(), name)
        else:
            assert_close(merged - original, delta.weight_delta(), atol=1e-6, what=name)
    tuned = {f"{name}.weight" for name in tuned_linears(model)}
    for key, tensor in dense.state_dict().items():
        if key not in tuned:
            assert_equal(plain.state_dict()[key], tensor, key)
    assert max_diff(eval_logits(plain, text_batch(0)), eval_logits(model, text_batch(0))) < 3.0
    assert not getattr(plain, "is_quantized", False) and getattr(plain.config, "quantization_config", None) is None


@pytest.mark.parametrize("method", [LORA, S2FT, EXACT], ids=["lora", "s2ft", "exact"])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_without_originals_it_warns_and_measures(method, base):
    model = shake(inlay.tune(llama(), method, base=base))
    batch = text_batch(0)
    with pytest.warns(
        UserWarning, match=r"dequantized weights, since the original .* not at hand.*max \|Δlogit\| .*e-0"
    ):
        plain = inlay.merge(model, inputs={"input_ids": batch["input_ids"]})
    assert no_quantized_left(plain)
    assert_close(eval_logits(plain, batch), eval_logits(model, batch), atol=1e-4)
    with pytest.warns(UserWarning, match=r"rounds away \d.\de.\d\d of them$"):
        inlay.merge(model)
    with pytest.warns(UserWarning):
        same = inlay.merge(model, in_place=True)
    assert same is model
    assert_state_equal(same.state_dict(), plain.state_dict())


def test_a_merged_checkpoint_is_dense_and_loads_anywhere(checkpoint, tmp_path):
    directory, _ = checkpoint
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=inlay.QuantizationConfig())
    plain = inlay.merge(shake(inlay.tune(model, LORA)))
    plain.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_state_equal(again.state_dict(), plain.state_dict())


def test_originals_that_do_not_fit(checkpoint, tmp_path):
    directory, dense = checkpoint
    model = shake(inlay.tune(copy.deepcopy(dense), LORA, base="nf4"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="wanted a directory with model.safetensors, found none"):
        inlay.merge(model, originals=tmp_path)
    with pytest.raises(ValueError, match=r"holds no dense model.layers.0.self_attn.q_proj.weight"):
        inlay.merge(model, originals=GOLDEN / "nf4")
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match="differs from the quantized weight by .* not what the model was quantized from"
    ):
        inlay.merge(model, originals=tmp_path / "other")
    llama(intermediate_size=64).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match="wanted shape"):
        inlay.merge(model, originals=tmp_path / "wider", in_place=True)
    assert_state_equal(model.state_dict(), before)


def test_a_quantized_checkpoint_is_no_original():
    """Recorded as where the model came from, but there are no dense weights in it."""
    model = shake(inlay.tune(inlay.from_pretrained(GOLDEN / "nf4"), LORA))
    with pytest.warns(UserWarning, match="not at hand"):
        plain = inlay.merge(model)
    assert no_quantized_left(plain) and "quantization_config" not in plain.config.to_dict()


def test_loftq_stays_with_its_base(checkpoint):
    """Its factors hold a part of the dense weights: on the originals that would count twice."""
    directory, dense = checkpoint
    model = shake(
        inlay.tune(AutoModelForCausalLM.from_pretrained(directory), inlay.LoRA(r=4, init="loftq"), base="nf4")
    )
    with pytest.raises(ValueError, match='init="loftq" moved a part of the dense weights into the adapter'):
        inlay.merge(model, originals=directory)
    with pytest.warns(UserWarning, match="since LoftQ's base is part of the adapter"):
        plain = inlay.merge(model)
    assert_close(eval_logits(plain, text_batch(0)), eval_logits(model, text_batch(0)), atol=1e-4)


def test_an_inactive_exact_adapter_leaves_no_holes():
    model = shake(inlay.tune(llama(), EXACT, base="nf4"))
    inlay.tune(model, inlay.LoRA(r=2, target_modules=["q_proj"]), adapter_name="second")
    model.set_adapter("second")
    with pytest.warns(UserWarning):
        plain = inlay.merge(model)
    assert_close(eval_logits(plain, text_batch(0)), eval_logits(model, text_batch(0)), atol=1e-4)


def test_conv1d(tmp_path):
    family = BY_NAME["gpt2"]
    dense = family.build()
    dense.save_pretrained(tmp_path)
    model = shake(inlay.tune(copy.deepcopy(dense), LORA, base="nf4"))
    plain = inlay.merge(model, originals=tmp_path)
    assert type(plain.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    delta = model.transformer.h[1].attn.c_proj.deltas["default"]
    original = dense.transformer.h[1].attn.c_proj.weight
    assert_close(plain.transformer.h[1].attn.c_proj.weight - original, delta.weight_delta().t(), atol=1e-6)
    with pytest.warns(UserWarning):
        dequantized = inlay.merge(model)
    assert_close(eval_logits(dequantized, family.batch(0)), eval_logits(model, family.batch(0)), atol=1e-4)


def test_prefixes(tmp_path):
    """A head on a checkpoint of its base model, and the other way round."""
    model = BY_NAME["bert"].build()
    model.bert.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert isinstance(loaded, BertForSequenceClassification)
    inlay.tune(
        loaded, inlay.LoRA(r=2, target_modules=["query", "value"]), base=inlay.BaseConfig(skip_modules=["classifier"])
    )
    plain = inlay.merge(shake(loaded), originals=tmp_path)
    key = plain.bert.encoder.layer[0].output.dense
    assert_equal(key.weight, model.bert.encoder.layer[0].output.dense.weight)
    assert type(key) is nn.Linear


def test_one_shard_is_read_at_a_time(checkpoint):
    directory, _ = checkpoint
    originals = Originals(directory)
    assert originals.has("model.layers.0.mlp.up_proj") and not originals.has("model.layers.7.mlp.up_proj")
    assert originals._open.keys() == {originals._files["model.layers.0.mlp.up_proj.weight"]}


def test_a_merge_that_would_be_lost_is_an_error():
    """PEFT's stock LoRA layer takes our linear for a dense one, and would add its delta to a copy of the weight."""
    peft = pytest.importorskip("peft")
    model = llama()
    quantize_linears(model, BaseConfig("nf4"))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    before = eval_logits(wrapped, text_batch(0))
    for safe in (False, True):
        with pytest.raises(TypeError, match=r"nothing can be merged into it. With PEFT, wrap .*accelerate_lora"):
            wrapped.merge_and_unload(safe_merge=safe)
    assert_equal(eval_logits(wrapped, text_batch(0)), before, "the wrapped model's answers")
    weight = wrapped.base_model.model.model.layers[0].mlp.up_proj.weight
    product = torch.randn(3, weight.shape[1]) @ weight.t()
    assert type(product) is torch.Tensor and type(weight.detach()) is torch.Tensor
