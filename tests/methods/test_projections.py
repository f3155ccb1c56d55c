"""Keys and values of fused projections are where they are said to be: attention itself is asked."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from comparing import assert_close
from families import BY_NAME, llama, perturb, text_batch

from inlay.methods.projections import LAYOUTS, fused_parts, keys_and_values
from inlay.roles import roles

_SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
_SHORT = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
_PAD = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_FALCON = {**_SIZES, "alibi": False, **_PAD}
MODELS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_SHORT)),
    "openai-gpt": lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**_SHORT)),
    "gpt_bigcode": lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**_SHORT)),
    "gpt_bigcode by head": lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**_SHORT, multi_query=False)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES, intermediate_size=48)),
    "persimmon": lambda: hf.PersimmonForCausalLM(
        hf.PersimmonConfig(**_SIZES, intermediate_size=48, qk_layernorm=False, **_PAD)
    ),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_FALCON)),
    "falcon by head": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_FALCON, multi_query=False)),
    "falcon in groups": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_SIZES, intermediate_size=48, num_key_value_heads=2, **_PAD)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=97, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)),
    "dbrx": lambda: hf.DbrxForCausalLM(
        hf.DbrxConfig(
            vocab_size=97,
            d_model=32,
            n_layers=1,
            n_heads=4,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 1e6},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_attention_agrees(name):
    model = perturb(MODELS[name]()).eval()
    assert model.config.model_type == name.split()[0]
    (fused,) = [path for path, channels in keys_and_values(model).items() if channels is not None]
    (output,) = [path for path, role in roles(model).items() if role == "o_proj"]
    parts, factor, seen = fused_parts(model, fused), [], []
    assert parts is not None
    width = sum(widths.numel() for widths in (parts.keys, parts.values))
    assert len(set(parts.both.tolist())) == width
    model.get_submodule(fused).register_forward_hook(lambda _, args, y: y * factor[-1] if factor else y)
    model.get_submodule(output).register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def attended(queries, keys, values):
        scales = torch.full((model.get_submodule(fused)(torch.zeros(1, 32)).shape[-1],), float(queries))
        scales[parts.keys], scales[parts.values] = keys, values
        factor.append(scales)
        with torch.no_grad():
            model(input_ids=text_batch(0)["input_ids"])
        return seen[-1]

    plain = attended(1, 1, 1)
    assert_close(attended(4, 0.25, 1), plain, atol=1e-5, what="queries against keys")
    assert_close(attended(1, 1, 3), 3 * plain, atol=1e-5, what="values")
    assert float((attended(4, 1, 1) - plain).abs().max()) > 1e-3, "queries do matter"


def test_every_layout_is_asked():
    assert {name.split()[0] for name in MODELS} == set(LAYOUTS)


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "vit", "t5", "mixtral", "qwen3"])
def test_separate_ones_by_name(name):
    model = BY_NAME[name].build()
    found = keys_and_values(model)
    layers = 6 if name == "t5" else 2  # two of the encoder, two of the decoder twice
    assert len(found) == 2 * layers and set(found.values()) == {None}


def test_keys_outside_attention_are_others():
    model = torch.nn.ModuleDict()
    for path in ("attention", "feed_forward"):
        model[path] = torch.nn.ModuleDict({"key": torch.nn.Linear(4, 4), "value": torch.nn.Linear(4, 4)})
    assert list(keys_and_values(model)) == ["attention.key", "attention.value"]


def test_none_where_there_is_no_attention():
    assert keys_and_values(llama().model.layers[0].mlp) == {}
