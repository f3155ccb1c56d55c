"""Exports to PEFT on families whose adapters PEFT rewrites or refuses: what it loads is what was exported."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from comparing import assert_close
from families import _LLAMA, BY_NAME, eval_logits, perturb, text_batch
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

import inlay
from inlay.adapters import peft_rules

_MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_GLM = _MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_QWEN = _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16}
_NEXT = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_ONE_GROUP = {"num_key_value_heads": 4}
MIXTURES = {
    "DeepseekV2": _GLM | _MLA | _ONE_GROUP,
    "DeepseekV3": _GLM | _MLA | _ONE_GROUP,
    "Glm4Moe": _GLM | {"head_dim": 8},
    "Dots1": _GLM | {"head_dim": 8},
    "Qwen2Moe": _QWEN,
    "Qwen3Moe": _QWEN | {"mlp_only_layers": [0], "head_dim": 8},
    "Qwen3Next": _QWEN | _NEXT | {"head_dim": 8},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Jamba": {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"mamba_d_state": 4, "mamba_dt_rank": 4},
}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)  # some families' decay rates are drawn at random
    config = getattr(transformers, f"{kind}Config")(**(_LLAMA | MIXTURES[kind]))
    return perturb(getattr(transformers, f"{kind}ForCausalLM")(config))


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return model


def assert_peft_answers_the_same(tuned, kind, folder):
    theirs = peft.PeftModel.from_pretrained(build(kind), folder)
    wanted = eval_logits(tuned, text_batch(0))
    with inlay.disabled(tuned):
        assert float((eval_logits(tuned, text_batch(0)) - wanted).abs().max()) > 1e-2, "the adapter does something"
    assert_close(eval_logits(theirs, text_batch(0)), wanted, atol=5e-5, what=kind)


@pytest.mark.parametrize("kind", MIXTURES)
def test_an_export_loads_in_peft(kind, tmp_path):
    tuned = randomized(inlay.tune(build(kind), inlay.S2FT(ratio=0.2)))
    inlay.export(tuned, tmp_path)
    assert_peft_answers_the_same(tuned, kind, tmp_path)


@pytest.mark.parametrize("kind", ["DeepseekV3", "Qwen3Next", "Glm4Moe"])
def test_a_saved_lora_loads_in_peft(kind, tmp_path):
    """Also gate and up projections, which PEFT would fuse."""
    tuned = randomized(inlay.tune(build(kind), inlay.LoRA(r=4)))
    tuned.save_pretrained(tmp_path)
    assert_peft_answers_the_same(tuned, kind, tmp_path)


def test_without_these_names_peft_drops_them(tmp_path, monkeypatch):
    """What the check is for: with plain targets PEFT loads less, and export would have said nothing."""
    tuned = randomized(inlay.tune(build("DeepseekV3"), inlay.S2FT(ratio=0.2)))
    monkeypatch.setattr(peft_rules, "_TAKEN", {})
    with pytest.raises(ValueError, match="PEFT would load this adapter without .* of its tensors|PEFT cannot load"):
        inlay.export(tuned, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_names_do_not_need_peft(tmp_path, monkeypatch):
    monkeypatch.setattr(peft_rules.importlib.util, "find_spec", lambda name: None)
    tuned = randomized(inlay.tune(build("DeepseekV3"), inlay.S2FT(ratio=0.2)))
    inlay.export(tuned, tmp_path)
    monkeypatch.undo()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all(name.endswith("down_proj.weight") for name in config["target_parameters"])
    assert_peft_answers_the_same(tuned, "DeepseekV3", tmp_path)


@pytest.mark.parametrize("kind", [*sorted(_MODEL_TO_CONVERSION_PATTERN), "mixtral", "llama", "jamba"])
def test_our_model_of_the_rules_is_theirs(kind):
    """Of every model that transformers converts: PEFT leaves the targets we name as modules, and takes the others."""
    from peft.utils.transformers_weight_conversion import _convert_peft_config_moe

    class Model(torch.nn.Module):
        config = transformers.PretrainedConfig()

    Model.config.model_type = kind
    leaves = [
        "q_proj",
        "o_proj",
        "out_proj",
        "gate",
        "gate_proj",
        "up_proj",
        "down_proj",
        "w1",
        "w2",
        "w3",
        "fc1",
        "dense",
    ]
    names = [f"model.layers.0.mlp.shared.{leaf}" for leaf in leaves]
    ours = peft_rules.peft_targets(Model(), dict.fromkeys(names))
    config = peft.LoraConfig(target_modules=names)
    _convert_peft_config_moe(config, Model())
    assert sorted(config.target_modules) == ours["target_modules"]


@pytest.mark.parametrize("name, config", [("Mamba", {"state_size": 4}), ("FalconMamba", {"state_size": 4})])
def test_peft_refuses_mambas_and_we_say_so(name, config, tmp_path):
    options = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, **config}
    model = perturb(getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options)))
    tuned = randomized(inlay.tune(model, inlay.LoRA(target_modules=["in_proj", "out_proj"], r=4)))
    with pytest.raises(ValueError, match=r"PEFT refuses LoRA on backbone.layers.0.mixer.out_proj.*inlay.merge"):
        inlay.export(tuned, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_refusals_are_theirs():
    """The lists are copies; the function is PEFT's."""
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as theirs

    class Model(torch.nn.Module):
        config = transformers.PretrainedConfig()

    for kind in (*peft_rules._MAMBAS, "jamba", "bamba", "llama", "zamba2", "granitemoehybrid"):
        Model.config.model_type = kind
        for leaf in ("out_proj", "conv1d", "in_proj", "o_proj"):
            refused = []
            for check in (
                lambda leaf=leaf: theirs(peft.LoraConfig(), Model(), leaf),
                lambda leaf=leaf: peft_rules.check_accepted(Model(), [f"mixer.{leaf}"]),
            ):
                try:
                    check()
                    refused.append(False)
                except ValueError:
                    refused.append(True)
            assert refused[0] == refused[1], (kind, leaf)


def test_tied_embeddings_that_trained_go_along(tmp_path):
    tuned = randomized(inlay.tune(BY_NAME["gemma"].build(), inlay.LoRA(r=4, modules_to_save=["embed_tokens"])))
    inlay.export(tuned, tmp_path / "export")
    tuned.save_pretrained(tmp_path / "saved")
    for folder in ("export", "saved"):
        theirs = peft.PeftModel.from_pretrained(BY_NAME["gemma"].build(), tmp_path / folder)
        assert_close(eval_logits(theirs, text_batch(0)), eval_logits(tuned, text_batch(0)), atol=5e-5, what="logits")


def test_vllm_takes_nothing_whole(tmp_path):
    tuned = randomized(inlay.tune(BY_NAME["llama"].build(), inlay.LoRA(r=8, modules_to_save=["norm"])))
    with pytest.raises(ValueError, match="norm.weight trained whole, which vLLM does not load"):
        inlay.export(tuned, tmp_path, format="vllm-lora")
