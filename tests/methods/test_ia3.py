"""(IA)³: where its vectors stand, what it keeps, and PEFT's files, both ways."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers as hf
from comparing import assert_close, assert_equal
from families import BY_NAME, class_batch, eval_logits, llama, perturb, text_batch
from methods import shake
from safetensors.torch import load_file, save_file

import inlay
from inlay.pieces.linear.rescale import PartRescale
from inlay.state import pieces_of


def falcon():
    config = hf.FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False, hidden_dropout=0.0
    )
    return perturb(hf.FalconForCausalLM(config))


BUILDERS = {name: BY_NAME[name].build for name in ("llama", "gpt2", "bert", "opt", "mixtral")} | {"falcon": falcon}


def sides(model, **options):
    tuned = inlay.tune(model, inlay.IA3(**options))
    return {path: (piece.side, piece.ia3_l.numel()) for path, piece in pieces_of(tuned, "default").items()}


def test_keys_values_and_the_input_of_down_projections():
    assert sides(llama(num_hidden_layers=1)) == {
        "model.layers.0.self_attn.k_proj": ("out", 16),
        "model.layers.0.self_attn.v_proj": ("out", 16),
        "model.layers.0.mlp.down_proj": ("in", 48),
    }
    found = sides(BY_NAME["gpt2"].build())
    assert found["transformer.h.0.attn.c_attn"] == ("out", 64) and found["transformer.h.1.mlp.c_proj"] == ("in", 128)
    assert {path.rpartition(".")[2] for path in sides(BY_NAME["t5"].build())} == {"k", "v", "wo"}
    assert sides(falcon())["transformer.h.0.self_attention.query_key_value"] == ("out", 16)  # multi-query


def test_named_targets():
    found = sides(llama(), target_modules=["q_proj", "up_proj", "down_proj"], feedforward_modules=["up_proj"])
    assert {path.rpartition(".")[2]: side for path, (side, _) in found.items()} == {
        "q_proj": "out",
        "up_proj": "in",
        "down_proj": "out",
    }


@pytest.mark.parametrize("base", [None, "int8"])
def test_a_gated_product_is_rebuilt_not_kept(base):
    tuned = inlay.tune(llama(), inlay.IA3(target_modules=["down_proj"]), base=base).train()
    mlp, kept = tuned.model.layers[0].mlp, []
    x = torch.randn(3, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        mlp(x)
    activations = [t for t in kept if t.shape == (3, 48)]
    assert len({t.data_ptr() for t in activations}) == 2, "gate and up"


# --- files of PEFT -----------------------------------------------------------------------------------------


def batch_of(name):
    return class_batch(0) if name == "bert" else text_batch(0)


@pytest.mark.parametrize("name", BUILDERS)
def test_peft_loads_ours(name, tmp_path):
    peft = pytest.importorskip("peft")
    ours = shake(inlay.tune(BUILDERS[name](), inlay.IA3()))
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a tensor that it did not find, or a layout that it had to correct
        warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
        warnings.filterwarnings("ignore", "Unexpected keyword arguments ..inlay")  # our section of the config
        theirs = peft.PeftModel.from_pretrained(BUILDERS[name](), tmp_path)
    wanted = eval_logits(ours, batch_of(name))
    assert_close(eval_logits(theirs, batch_of(name)), wanted, atol=2e-5, what="logits")
    assert_close(eval_logits(theirs.merge_and_unload(), batch_of(name)), wanted, atol=2e-5, what="merged")
    assert float((eval_logits(BUILDERS[name](), batch_of(name)) - wanted).abs().max()) > 1e-3


TARGETS = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "opt": (["q_proj", "k_proj", "fc2"], ["fc2"]),
    "mixtral": (["k_proj", "v_proj"], []),
    "falcon": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
}


@pytest.mark.parametrize("name", TARGETS)
def test_we_load_theirs(name, tmp_path):
    peft = pytest.importorskip("peft")
    targets, feedforward = TARGETS[name]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=name == "gpt2")
    theirs = peft.get_peft_model(BUILDERS[name](), config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "ia3_l" in key:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    theirs.save_pretrained(tmp_path)
    wanted = eval_logits(theirs, batch_of(name))
    ours = inlay.load(BUILDERS[name](), tmp_path)
    assert not any(isinstance(piece, PartRescale) for piece in pieces_of(ours, "default").values())
    assert_close(eval_logits(ours, batch_of(name)), wanted, atol=2e-5, what="logits")
    assert_close(eval_logits(inlay.merge(ours), batch_of(name)), wanted, atol=2e-5, what="merged")


def test_options_of_peft_that_we_have_not(tmp_path):
    shake(inlay.tune(llama(), inlay.IA3())).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["inlay"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "new_option": 3}))
    with pytest.raises(ValueError, match="uses new_option=3, which inlay's IA3 has not"):
        inlay.load(llama(), tmp_path)


def test_channels_in_a_file_are_checked(tmp_path):
    build = BUILDERS["gpt2"]
    shake(inlay.tune(build(), inlay.IA3())).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    key = next(key for key in good if key.endswith("c_attn.ia3_channels"))
    full = good[key.replace("ia3_channels", "ia3_l")]
    assert full.shape == (96, 1) and bool((full[:32] == 1).all()) and bool((full[32:] != 1).all())
    for bad, message in ((good[key] + 1, "wanted channels in"), (good[key].flip(0), ""), (good[key].float(), "whole")):
        save_file({**good, key: bad}, path)
        if not message:  # in another order they say the same
            tuned = inlay.load(build(), tmp_path)
            assert_equal(pieces_of(tuned, "default")["transformer.h.0.attn.c_attn"].full().detach(), full, "vector")
            continue
        with pytest.raises(ValueError, match=message):
            inlay.load(build(), tmp_path)


# --- refusals ----------------------------------------------------------------------------------------------


def test_what_cannot_be_meant():
    with pytest.raises(ValueError, match="feedforward_modules: 'up_proj' is none of the tuned linears"):
        inlay.tune(llama(), inlay.IA3(feedforward_modules=["up_proj"]))
    with pytest.raises(ValueError, match="found no projection of keys and values"):
        inlay.tune(torch.nn.Sequential(torch.nn.Linear(4, 4)), inlay.IA3())
    tuned = inlay.tune(llama(), inlay.IA3())
    inlay.tune(tuned, inlay.IA3(), adapter_name="second")
    with pytest.raises(ValueError, match="do not add up"):
        tuned.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")


def test_input_vectors_nest_with_other_adapters():
    for order in (["ia3", "lora"], ["lora", "ia3"]):
        tuned = inlay.tune(llama(), inlay.IA3(), adapter_name="ia3")
        inlay.tune(shake(tuned, seed=1), inlay.LoRA(r=4), adapter_name="lora")
        shake(tuned, seed=2).set_adapter(order)
        wanted = eval_logits(tuned, text_batch(0))
        assert_close(eval_logits(inlay.merge(tuned), text_batch(0)), wanted, atol=2e-5, what=str(order))
