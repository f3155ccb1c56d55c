"""Parameters that the user unfroze beside the adapter: they are in the adapter, and come back with it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from comparing import assert_close, assert_equal
from families import BY_NAME, eval_logits, llama, text_batch
from safetensors.torch import load_file
from test_modules_to_save import train

import inlay


def unfrozen(names, build=llama, method=None):
    model = inlay.tune(build(), method or inlay.LoRA(r=4, target_modules=["q_proj", "down_proj"]))
    for key, parameter in model.named_parameters():
        if any(name in key for name in names):
            parameter.requires_grad_(True)
    return train(model, text_batch(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["up_proj"], ["model.norm"]])
def test_they_come_back(names, dtype, tmp_path):
    build = lambda: llama().to(dtype)  # noqa: E731
    tuned = unfrozen(names, build)
    before, after = dict(build().named_parameters()), dict(tuned.named_parameters())
    keys = [key for key in before if any(name in key for name in names)]
    assert all(not torch.equal(before[key], after[key]) for key in keys)
    tuned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["inlay"]["unfrozen"] == sorted(keys) and config["inlay"]["format"] == 2
    loaded = inlay.load(build(), tmp_path)
    rounding = 0.0 if names != ["model.norm"] else 1e-6 if dtype is torch.float32 else 0.05  # a norm no longer fused
    assert_close(eval_logits(loaded, text_batch(1)), eval_logits(tuned, text_batch(1)), atol=rounding, what="logits")
    assert all(loaded.get_parameter(key).requires_grad for key in keys)
    with inlay.disabled(loaded), inlay.disabled(inlay.tune(build(), inlay.LoRA(r=4))) as base:
        assert_close(eval_logits(loaded, text_batch(1)), eval_logits(base, text_batch(1)), atol=rounding, what="base")
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    bound = 2e-5 if dtype is torch.float32 else 0.2
    assert_close(eval_logits(theirs, text_batch(1)), eval_logits(tuned, text_batch(1)), atol=bound, what="peft")
    loaded.save_pretrained(tmp_path / "again")
    again = inlay.load(build(), tmp_path / "again")
    assert_close(eval_logits(again, text_batch(1)), eval_logits(loaded, text_batch(1)), atol=0, what="saved twice")


def test_a_trained_bias_of_a_tuned_linear(tmp_path):
    build = BY_NAME["gpt2"].build
    tuned = inlay.tune(build(), inlay.LoRA(r=4, target_modules=["c_fc"]), fused_blocks=False)
    with torch.no_grad():
        bias = tuned.transformer.h[0].mlp.c_fc.bias
        bias.requires_grad_(True)
        bias.add_(0.3)
        tuned.transformer.h[0].mlp.c_fc.deltas["default"].lora_B.add_(0.1)
    tuned.save_pretrained(tmp_path)
    loaded = inlay.load(build(), tmp_path)
    assert_equal(eval_logits(loaded, text_batch(1)), eval_logits(tuned, text_batch(1)), "logits")
    merged = inlay.merge(loaded)
    assert_close(eval_logits(merged, text_batch(1)), eval_logits(tuned, text_batch(1)), atol=2e-5, what="merged")
    with inlay.disabled(loaded):
        assert_close(eval_logits(loaded, text_batch(1)), eval_logits(build(), text_batch(1)), atol=2e-5, what="base")


def test_a_checkpoint_holds_them(tmp_path):
    tuned = unfrozen(["model.norm"])
    tuned.save_pretrained(tmp_path)
    resume = load_file(tmp_path / "model.safetensors")
    again = inlay.tune(llama(), inlay.LoRA(r=4, target_modules=["q_proj", "down_proj"]))
    again.model.norm.weight.requires_grad_(True)
    again.load_state_dict(resume, strict=False)
    assert_equal(eval_logits(again, text_batch(1)), eval_logits(tuned, text_batch(1)), "resumed")


@pytest.mark.parametrize("name, tied", [("llama", False), ("gemma", True)])
def test_a_resized_vocabulary_comes_along(name, tied, tmp_path):
    def build():
        torch.manual_seed(0)
        return BY_NAME[name].build()

    def resized():
        model = build()
        model.resize_token_embeddings(101, mean_resizing=False)
        return model

    tuned = unfrozen(["embed_tokens", "lm_head"], resized)
    tuned.save_pretrained(tmp_path)
    loaded = inlay.load(build(), tmp_path)
    assert loaded.config.vocab_size == 101
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert_equal(eval_logits(loaded, text_batch(1)), eval_logits(tuned, text_batch(1)), "logits")
    merged = inlay.merge(loaded)
    assert merged.get_input_embeddings().weight.shape[0] == 101

    by_name = train(inlay.tune(resized(), inlay.LoRA(r=4, modules_to_save=["embed_tokens", "lm_head"])), text_batch(0))
    by_name.save_pretrained(tmp_path / "named")
    loaded = inlay.load(build(), tmp_path / "named")
    assert_equal(eval_logits(loaded, text_batch(1)), eval_logits(by_name, text_batch(1)), "named")


def test_a_resized_vocabulary_that_is_not_in_the_adapter(tmp_path):
    model = llama()
    model.resize_token_embeddings(101, mean_resizing=False)
    tuned = train(inlay.tune(model, inlay.LoRA(r=4)), text_batch(0))
    tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"trained with 101 tokens and this LlamaForCausalLM has 97: call resize"):
        inlay.load(llama(), tmp_path)
    other = llama()
    torch.manual_seed(9)
    other.resize_token_embeddings(101, mean_resizing=False)
    inlay.load(other, tmp_path)


def test_a_tuned_model_is_not_resized_by_a_second_adapter(tmp_path):
    model = llama()
    model.resize_token_embeddings(101, mean_resizing=False)
    unfrozen(["embed_tokens", "lm_head"], lambda: model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained with 101 tokens"):
        inlay.load(inlay.tune(llama(), inlay.LoRA(r=4)), tmp_path, name="second")


def test_the_weighted_sum_takes_them_in(tmp_path):
    unfrozen(["model.norm"]).save_pretrained(tmp_path / "one")
    unfrozen(["model.norm", "up_proj"]).save_pretrained(tmp_path / "two")
    model = inlay.load(llama(), tmp_path / "one", name="one")
    inlay.load(model, tmp_path / "two", name="two")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.25], "mix")
    model.set_adapter("mix")
    key, start = "model.norm.weight", llama().model.norm.weight
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    wanted = start + 0.5 * (files[0][key] - start) + 0.25 * (files[1][key] - start)
    assert_close(model.model.norm.weight, wanted, atol=1e-6, what="norm")
    model.delete_adapter("one")
    model.delete_adapter("two")
    eval_logits(model, text_batch(1))
