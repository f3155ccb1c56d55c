"""Adapter files that are broken, foreign or for another model: refused with a reason, the model left as it was."""

from __future__ import annotations

import json

import pytest
import torch
from comparing import assert_close, assert_state_equal
from families import BY_NAME, eval_logits, llama, text_batch
from oracle import randomize, train
from safetensors.torch import load_file, save_file

import inlay


@pytest.fixture
def adapter(tmp_path):
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2))
    randomize(tuned, 0.1)
    tuned.save_pretrained(tmp_path)
    return tmp_path


def refused(directory, match, model=None, **options):
    model = llama() if model is None else model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    types = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=match) as caught:
        inlay.load(model, directory, **options)
    assert_state_equal(model.state_dict(), before)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert all(p.requires_grad for p in model.parameters())
    return str(caught.value)


def edit_config(directory, change):
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file(tensors, path)


VALUES = "base_model.model.model.layers.0.mlp.down_proj.s2ft_values"
INDICES = "base_model.model.model.layers.0.mlp.down_proj.s2ft_indices"


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(adapter, keep):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(adapter, r"adapter_model.safetensors cannot be read.*truncated or corrupt")


def test_garbage_weights(adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"\x80\x04 not a safetensors file" * 100)
    refused(adapter, "truncated or corrupt")


@pytest.mark.parametrize("text", ["", "{", '{"peft_type": "S2FT"', "\xff\xfe"])
def test_corrupt_config(adapter, text):
    (adapter / "adapter_config.json").write_bytes(text.encode("latin-1"))
    refused(adapter, r"adapter_config.json is no JSON.*corrupt")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"S2FT"'])
def test_a_config_that_is_no_object(adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    refused(adapter, "wanted a JSON object")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file(adapter, name):
    (adapter / name).unlink()
    refused(adapter, f"found no {name}")


def test_a_missing_directory(tmp_path):
    refused(tmp_path / "nowhere", "found no adapter_config.json")


def test_an_unknown_peft_type(adapter):
    edit_config(adapter, lambda config: config.update(peft_type="VERA"))
    refused(adapter, r"wanted an adapter of .*S2FT.*got peft_type='VERA'")


def test_a_newer_format(adapter):
    edit_config(adapter, lambda config: config["inlay"].update(format=99))
    refused(adapter, "format 99 is newer.*upgrade inlay")


@pytest.mark.parametrize("section", [None, 3, {}, {"options": 3}, {"options": {}, "format": "new"}])
def test_a_broken_inlay_section(adapter, section):
    edit_config(adapter, lambda config: config.update(inlay=section))
    refused(adapter, "inlay|option|format")


def test_an_unknown_option(adapter):
    edit_config(adapter, lambda config: config["inlay"]["options"].update(ration=0.5))
    refused(adapter, "no option 'ration'; did you mean 'ratio'")


def test_an_option_out_of_range(adapter):
    edit_config(adapter, lambda config: config["inlay"]["options"].update(update="sideways"))
    refused(adapter, "update: wanted one of")


def test_a_peft_lora_directory_is_named(adapter, tmp_path):
    edit_config(adapter, lambda config: (config.update(peft_type="LORA"), config.pop("inlay")))
    refused(adapter, "'inlay' section|peft_type")


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: {}, "holds no tensor"),
        (lambda t: t.update({"other.key": torch.zeros(1)}), "wanted keys like base_model.model"),
        (lambda t: t.update({VALUES + "s": torch.ones(2)}), "wanted keys like base_model.model"),
        (lambda t: t.pop(VALUES), "down_proj: wanted tensors.*the file is incomplete"),
        (lambda t: t.pop(INDICES), "down_proj: wanted s2ft_indices"),
        (lambda t: t.update({VALUES: t[VALUES][:, 1:].clone()}), r"down_proj.s2ft_values: wanted shape \(32, 10\)"),
        (lambda t: t.update({VALUES: t[VALUES][:31].clone()}), r"down_proj.s2ft_values: wanted shape \(32, 10\)"),
        (lambda t: t.update({INDICES: t[INDICES] + 40}), r"down_proj: wanted channels in \[0, 48\)"),
        (lambda t: t.update({INDICES: t[INDICES] - 40}), r"down_proj: wanted channels in \[0, 48\)"),
        (lambda t: t.update({INDICES: t[INDICES] * 0}), "down_proj: wanted distinct channels"),
        (
            lambda t: t.update({INDICES: t[INDICES].float() + 0.5}),
            "down_proj: wanted whole channel numbers",
        ),
        (lambda t: t.update({VALUES: t[VALUES] * float("nan")}), "down_proj.*NaN"),
    ],
)
def test_tensors_that_do_not_fit(adapter, change, match):
    def apply(tensors):
        result = change(tensors)
        return result if isinstance(result, dict) else None

    edit_tensors(adapter, apply)
    if "holds no tensor" in match:
        save_file({}, adapter / "adapter_model.safetensors")
    refused(adapter, match)


@pytest.mark.parametrize("update", ["additive", "in_place"])
def test_indices_in_another_order_carry_their_values_with_them(update, adapter):
    """Another writer may not have sorted them; then the values' columns are in that order too."""
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2, update=update))
    randomize(tuned, 0.1)
    tuned.save_pretrained(adapter)
    reference = inlay.load(llama(), adapter)
    order = torch.randperm(10)

    def shuffle(tensors):
        for key in (VALUES, VALUES.replace("values", "original")):
            if key in tensors:
                tensors[key] = tensors[key][:, order].contiguous()
        tensors[INDICES] = tensors[INDICES][order]

    edit_tensors(adapter, shuffle)
    loaded = inlay.load(llama(), adapter)
    assert_state_equal(inlay.merge(loaded).state_dict(), inlay.merge(reference).state_dict())
    assert_close(eval_logits(loaded, text_batch(0)), eval_logits(reference, text_batch(0)), atol=1e-5, what="logits")
    for model in (loaded, reference):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), [text_batch(0)])
    assert_state_equal(loaded.state_dict(), reference.state_dict())


def test_a_model_without_the_tuned_modules(adapter):
    refused(adapter, r"tunes 'model\.layers\.1.*', which this LlamaForCausalLM lacks", llama(num_hidden_layers=1))
    refused(adapter, "which this GPT2LMHeadModel lacks", BY_NAME["gpt2"].build())


def test_a_model_of_another_size(adapter):
    refused(adapter, "not the base|wanted", llama(hidden_size=64, intermediate_size=96))
    refused(adapter, "wanted shape", llama(hidden_size=64, intermediate_size=96), check_base=False)
    refused(adapter, "wanted", llama(intermediate_size=20), check_base=False)


def test_another_base_of_the_same_shape(adapter):
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.std())
    assert "check_base=False" in refused(adapter, "not the base the adapter was trained on", other)
    inlay.load(other, adapter, check_base=False)


def test_the_base_in_bfloat16_or_lightly_trained_is_the_same_base(adapter):
    inlay.load(llama().to(torch.bfloat16), adapter)
    near = llama()
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) * parameter.std())
    inlay.load(near, adapter)


def test_a_name_that_is_taken(adapter):
    tuned = inlay.load(llama(), adapter)
    before = {key: tensor.clone() for key, tensor in tuned.state_dict().items()}
    with pytest.raises(ValueError, match="has an adapter 'default' already; pass another name"):
        inlay.load(tuned, adapter)
    assert_state_equal(tuned.state_dict(), before)
    tuned.eval()(**text_batch(0))
