"""Families that change what a linear returns in place train on every base, with the gradients of full autograd."""

from __future__ import annotations

import pytest
import transformers as hf
from comparing import assert_close
from families import VOCABULARY, perturb, text_batch
from oracle import deltas_of, trained_entries

import inlay
from inlay.bases.quantized import QuantizedWeight

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLP = {"intermediate_size": 48, "max_position_embeddings": 64}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def gemma3n():
    config = hf.Gemma3nTextConfig(
        **_SIZES,
        **_MLP,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        num_kv_shared_layers=0,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=8,
        activation_sparsity_pattern=[0.5, 0.0],
    )
    return hf.Gemma3nForCausalLM(config)


def falcon(**options):
    return hf.FalconForCausalLM(hf.FalconConfig(**_SIZES, hidden_dropout=0.0, attention_dropout=0.0, **options))


def deberta(model, config):
    options = {"relative_attention": True, "max_relative_positions": 16, "pos_att_type": ["p2c", "c2p"]}
    return model(config(**_SIZES, **_MLP, **_NO_DROPOUT, type_vocab_size=0, pooler_dropout=0.0, **options))


FAMILIES = {
    "falcon": (falcon, ["query_key_value", "dense", "dense_4h_to_h"]),
    "falcon, parallel": (
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
        ["query_key_value", "dense_4h_to_h"],
    ),
    "deberta": (lambda: deberta(hf.DebertaForMaskedLM, hf.DebertaConfig), ["in_proj", "dense"]),
    "deberta-v2": (lambda: deberta(hf.DebertaV2ForMaskedLM, hf.DebertaV2Config), ["query_proj", "key_proj"]),
    "olmo": (
        lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**_SIZES, **_MLP, clip_qkv=0.5)),
        ["q_proj", "v_proj", "down_proj"],
    ),
    "gemma3n": (gemma3n, ["q_proj", "down_proj", "per_layer_input_gate"]),
}


@pytest.mark.parametrize("base", [None, "nf4", "int8"])
@pytest.mark.parametrize("method", [inlay.S2FT(ratio=0.3), inlay.LoRA(r=2)], ids=["s2ft", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_full_autograd(name, method, base):
    """On a quantized base the oracle is the dense model with the dequantized weights."""
    build, targets = FAMILIES[name]
    method.target_modules = targets
    tuned, eager = inlay.tune(perturb(build()), method, base=base), perturb(build())
    for path, module in tuned.named_modules():
        if isinstance(module, QuantizedWeight):
            eager.get_submodule(path).weight.data.copy_(module.weight)
    eager.requires_grad_(True)
    wanted = eager(**text_batch(0)).loss
    wanted.backward()
    loss = tuned(**text_batch(0)).loss
    loss.backward()
    assert_close(loss, wanted, atol=2e-5, what="loss")
    for path, delta in deltas_of(tuned).items():
        full = eager.get_submodule(path).weight.grad
        if isinstance(method, inlay.S2FT):
            ours, full = delta.s2ft_values.grad, trained_entries(tuned, path, full)
        else:
            ours, full = delta.lora_B.grad, delta.scale * full @ delta.lora_A.detach().t()
        assert bool(full.any()), f"{path}: nothing to compare"
        assert_close(ours, full, atol=3e-5 * float(full.abs().max()), what=path)
