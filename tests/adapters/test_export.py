"""Export: a LoRA that PEFT loads, whose product is ΔW bit for bit."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from comparing import assert_close, assert_equal
from families import BY_NAME, eval_logits, llama, prompt, text_batch
from oracle import deltas_of, randomize
from peft import PeftModel
from safetensors.torch import load_file

import inlay

UPDATES = ["additive", "in_place"]
CHOICES = {
    "defaults": {"ratio": 0.2},
    "ranks that differ": {"channels": {"o_proj": 8, "down_proj": 3}},
    "output channels": {"target_modules": ["q_proj", "v_proj", "up_proj"], "ratio": 0.2},
    "both sides": {"target_modules": "all-linear", "ratio": 0.1, "granularity": 1},
}


def trained(family, update="additive", **options):
    tuned = inlay.tune(family.build(), inlay.S2FT(update=update, **options))
    randomize(tuned, 0.1)
    return tuned


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("choice", CHOICES)
def test_peft_answers_as_the_tuned_llama(choice, update, tmp_path):
    check_in_peft(trained(BY_NAME["llama"], update, **CHOICES[choice]), BY_NAME["llama"], tmp_path)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("options", [{"ratio": 0.2}, {"target_modules": "all-linear", "ratio": 0.1, "granularity": 1}])
def test_peft_answers_as_the_tuned_gpt2(options, update, tmp_path):
    check_in_peft(trained(BY_NAME["gpt2"], update, **options), BY_NAME["gpt2"], tmp_path)


@pytest.mark.parametrize("name", ["gemma", "opt", "t5", "mixtral", "bert", "vit"])
def test_peft_answers_as_the_other_families(name, tmp_path):
    check_in_peft(trained(BY_NAME[name], ratio=0.2), BY_NAME[name], tmp_path)


def check_in_peft(tuned, family, directory):
    inlay.export(tuned, directory, format="peft-lora")
    assert sorted(p.name for p in directory.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    peft = PeftModel.from_pretrained(family.build(), str(directory)).eval()
    base = eval_logits(family.build(), family.batch(0))
    wanted = eval_logits(tuned, family.batch(0))
    assert not torch.allclose(base, wanted, atol=1e-3)
    assert_close(eval_logits(peft, family.batch(0)), wanted, atol=1e-5, what="logits")
    layers = {name: module for name, module in peft.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert sorted(layers) == sorted(deltas_of(tuned))
    for path, delta in deltas_of(tuned).items():
        layer = layers[path]
        assert layer.scaling["default"] == 1
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert_equal(product.detach(), delta.weight_delta(), f"B·A of {path}")


def test_greedy_tokens_agree(tmp_path):
    tuned = trained(BY_NAME["llama"], ratio=0.3)
    inlay.export(tuned, tmp_path)
    peft = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    ids = prompt(rows=3)
    assert torch.equal(tuned.eval().generate(ids, **options), peft.generate(input_ids=ids, **options))


def test_ranks_are_padded_to_one_and_alpha_is_the_rank(tmp_path):
    inlay.export(trained(BY_NAME["llama"], **CHOICES["ranks that differ"]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("LORA", 8, 8, False)
    assert not config["fan_in_fan_out"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {8}
    assert {t.shape[1] for k, t in tensors.items() if "lora_B" in k} == {8}


def test_factors_alone_give_the_delta_in_bfloat16_models():
    tuned = inlay.tune(llama().to(torch.bfloat16), inlay.S2FT(ratio=0.2, update="in_place"))
    randomize(tuned, 0.1)
    for path, delta in deltas_of(tuned).items():
        a, b = delta.lora_factors()
        assert_equal(b @ a, delta.weight_delta(), path)


def test_export_by_name(tmp_path):
    tuned = trained(BY_NAME["llama"], ratio=0.2)
    wanted = eval_logits(tuned, text_batch(0))
    inlay.tune(tuned, inlay.S2FT(ratio=0.1, seed=4), adapter_name="other")
    inlay.export(tuned, tmp_path, name="default")
    peft = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert_close(eval_logits(peft, text_batch(0)), wanted, atol=1e-5, what="logits")


def test_refusals(tmp_path):
    tuned = trained(BY_NAME["llama"], ratio=0.2)
    with pytest.raises(ValueError, match=r"format: wanted one of \('peft-lora', 'vllm-lora'\), got 'gguf'"):
        inlay.export(tuned, tmp_path, format="gguf")
    with pytest.raises(ValueError, match="no adapter 'x'; there are \\['default'\\]"):
        inlay.export(tuned, tmp_path, name="x")
    with pytest.raises(TypeError, match="wanted a model from inlay.tune"):
        inlay.export(llama(), tmp_path)
    inlay.tune(tuned, inlay.S2FT(ratio=0.1, seed=4), adapter_name="other")
    tuned.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="wanted one active adapter to export"):
        inlay.export(tuned, tmp_path)
    assert not list(tmp_path.iterdir())


def test_export_does_not_overwrite_a_saved_adapter(tmp_path):
    tuned = trained(BY_NAME["llama"], ratio=0.2)
    tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter saved by inlay; export to another directory"):
        inlay.export(tuned, tmp_path)
    inlay.load(llama(), tmp_path)
    inlay.export(tuned, tmp_path / "lora")
    inlay.export(tuned, tmp_path / "lora")  # its own output it may replace


def test_an_untrained_adapter_is_not_exported(tmp_path):
    tuned = inlay.tune(llama(), inlay.S2FT())
    with pytest.raises(ValueError, match="changes nothing"):
        inlay.export(tuned, tmp_path / "out")
    randomize(tuned, 0.1)
    with torch.no_grad():
        list(deltas_of(tuned).values())[0].s2ft_values[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        inlay.export(tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vllm_gets_a_rank_it_has_and_the_same_answers(tmp_path, capsys):
    tuned = trained(BY_NAME["llama"], channels={"o_proj": 8, "down_proj": 11})
    inlay.export(tuned, tmp_path, format="vllm-lora")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (16, 16, None)
    assert "--max-lora-rank 16" in capsys.readouterr().out
    peft = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert_close(eval_logits(peft, text_batch(0)), eval_logits(tuned, text_batch(0)), atol=1e-5, what="logits")


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gpt2", {"ratio": 0.2}, "is a Conv1D, for whose models vLLM has no LoRA"),
        ("t5", {"ratio": 0.2}, "wanted a decoder-only language model"),
        ("bert", {"ratio": 0.2}, "wanted a decoder-only language model"),
        ("llama", {"target_modules": ["lm_head"], "ratio": 0.2}, "is the output head"),
    ],
)
def test_what_vllm_would_not_serve_is_refused_with_the_reason(family, options, reason, tmp_path):
    with pytest.raises(ValueError, match=f"vllm-lora: .*{reason}"):
        inlay.export(trained(BY_NAME[family], **options), tmp_path / "out", format="vllm-lora")
    assert not (tmp_path / "out").exists()


def test_a_rank_vllm_does_not_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["inlay.adapters.export"], "VLLM_RANKS", (1, 8))
    with pytest.raises(ValueError, match="wanted a rank of at most 8, got"):
        inlay.export(trained(BY_NAME["llama"], channels={"o_proj": 8, "down_proj": 11}), tmp_path, format="vllm-lora")
