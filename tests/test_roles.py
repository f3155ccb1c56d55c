"""The attention outputs and FFN down projections that structure finds, on models of full width without memory."""

from __future__ import annotations

import re

import pytest
import torch
import transformers as hf
from families import BY_NAME
from torch import nn

import inlay
from inlay.methods.heads import head_dim_of
from inlay.roles import roles
from inlay.targets import resolve

_DEPTH = re.compile(r"(num_(hidden_|encoder_|decoder_)?layers|n_layers?|(en|de)coder_layers)")

#: By model type: the endings of attention (or token mixer) outputs, and those of FFN down projections.
FOUND = {
    "albert": ("attention.dense", "ffn_output"),
    "bamba": ("mamba.out_proj", "feed_forward.down_proj"),
    "bert": ("attention.output.dense", "N.output.dense"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "codegen": ("attn.out_proj", "mlp.fc_out"),
    "ctrl": ("multi_head_attention.dense", "ffn.2"),
    "deepseek_v3": ("self_attn.o_proj", "mlp.down_proj mlp.shared_experts.down_proj"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "falcon_h1": ("mamba.out_proj self_attn.o_proj", "feed_forward.down_proj"),
    "falcon_mamba": ("mixer.out_proj", ""),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neo": ("attn.attention.out_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "gpt_oss": ("self_attn.o_proj", ""),
    "gptj": ("attn.out_proj", "mlp.fc_out"),
    "lfm2": ("conv.out_proj self_attn.out_proj", "feed_forward.w2"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "longcat_flash": ("self_attn.N.o_proj", "mlps.N.down_proj"),
    "mamba": ("mixer.out_proj", ""),
    "mixtral": ("self_attn.o_proj", ""),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "nemotron_h": ("mixer.out_proj mixer.o_proj", "mixer.down_proj mixer.shared_experts.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "perceiver": ("attention.output.dense", "mlp.dense2"),
    "persimmon": ("self_attn.dense", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "qwen3_next": ("linear_attn.out_proj self_attn.o_proj", "mlp.shared_expert.down_proj"),
    "recurrent_gemma": ("temporal_block.linear_out temporal_block.o_proj", "mlp_block.down_proj"),
    "rwkv": ("attention.output", "feed_forward.value"),
    "swin": ("attention.o_proj", "mlp.fc2"),
    "t5": ("SelfAttention.o EncDecAttention.o", "DenseReluDense.wo"),
    "vit": ("attention.o_proj", "mlp.fc2"),
    "wav2vec2": ("attention.out_proj", "feed_forward.output_dense"),
    "wavlm": ("attention.out_proj", "feed_forward.output_dense"),
    "whisper": ("self_attn.out_proj encoder_attn.out_proj", "fc2"),
    "xlm": ("out_lin", "lin2"),
    "xlnet": ("", "ff.layer_2"),
    "zamba2": ("mamba.out_proj shared_transformer.self_attn.o_proj", "feed_forward.down_proj"),
}


def build(model_type: str) -> nn.Module:
    """A model of the default config, at most four blocks deep, on the meta device."""
    config = hf.CONFIG_MAPPING[model_type]()
    for name in list(vars(config)):
        if _DEPTH.fullmatch(name) and isinstance(getattr(config, name), int):
            setattr(config, name, min(getattr(config, name), 4))
    if model_type == "lfm2":
        config.layer_types = ["conv", "conv", "full_attention", "conv"]
    with torch.device("meta"):
        return hf.AutoModel.from_config(config)


@pytest.mark.parametrize("model_type", FOUND)
def test_roles_by_structure(model_type):
    played = roles(build(model_type))
    for role, endings in zip(("o_proj", "down_proj"), FOUND[model_type], strict=True):
        names = {re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name, found in played.items() if found == role}
        for ending in endings.split():
            assert any(name.endswith(f".{ending}") for name in names), (role, ending, names)
        assert not [name for name in names if not name.endswith(tuple(f".{e}" for e in endings.split()))], (role, names)


def test_every_block_is_covered():
    """One of each role in every block of a plain transformer, however it names them."""
    for model_type in ("bloom", "falcon", "gptj", "modernbert", "phi"):
        model = build(model_type)
        stack = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
        assert len(roles(model)) == 2 * len(stack) >= 4, model_type


def test_names_decide_where_structure_does_not():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.o_proj, self.down_proj, self.other = (nn.Linear(8, 8) for _ in range(3))

    flat = nn.Sequential(Block(), Block())
    listed = nn.Module()
    listed.blocks = nn.ModuleList([Block(), Block()])
    for model, at in ((flat, ""), (listed, "blocks.")):
        found = {f"{at}{index}.{role}": role for index in (0, 1) for role in ("o_proj", "down_proj")}
        assert roles(model) == found


def test_sides_follow_roles_and_come_back_from_a_file(tmp_path):
    """``fc_out`` is a down projection by structure alone: its input channels train, and load as such."""
    config = hf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=32)
    torch.manual_seed(0)
    model = hf.GPTJForCausalLM(config)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    tuned = inlay.tune(model, inlay.S2FT(ratio={"o_proj": 0.25, "down_proj": 0.1}))
    deltas = {name: module.deltas["default"] for name, module in tuned.named_modules() if hasattr(module, "deltas")}
    assert {name.rpartition(".")[2] for name in deltas} == {"out_proj", "fc_out"}
    assert {delta.side for delta in deltas.values()} == {"in"}
    for delta in deltas.values():
        torch.nn.init.normal_(delta.s2ft_values)
    tuned.save_pretrained(tmp_path)
    plain = hf.GPTJForCausalLM(config)
    plain.load_state_dict(state)
    loaded = inlay.load(plain, tmp_path)
    for name, delta in deltas.items():
        again = loaded.get_submodule(name).deltas["default"]
        assert again.side == "in" and torch.equal(again.weight_delta(), delta.weight_delta())


def test_one_role_alone_is_said():
    with pytest.warns(UserWarning, match="found no FFN down projection.*only \\['o_proj'\\] are tuned"):
        inlay.tune(BY_NAME["mixtral"].build(), inlay.S2FT(ratio=0.2))


def test_no_role_names_what_to_pass():
    model = build("squeezebert")
    with pytest.raises(ValueError, match="matched no linear of this SqueezeBertModel.*pass target_modules.*end in"):
        resolve(model, None)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash"])
def test_heads_of_latent_attention_are_as_wide_as_their_values(model_type):
    model = build(model_type)
    name = next(name for name, role in roles(model).items() if role == "o_proj")
    channels = model.get_submodule(name).in_features
    width = head_dim_of(model, name, "o_proj", channels)
    assert width == model.config.v_head_dim and channels == width * model.config.num_attention_heads
    indices = inlay.S2FT(ratio=0.01).choose(model, [name], None)[name].tolist()
    assert len(indices) % width == 0 and indices[0] % width == 0


def test_convolutions_beside_attention_have_no_heads():
    model = build("lfm2")
    name = next(name for name in roles(model) if name.endswith("conv.out_proj"))
    assert head_dim_of(model, name, "o_proj", model.get_submodule(name).in_features) is None
