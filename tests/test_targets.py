"""Which linears a target means, in every family, and what is said when it means none."""

from __future__ import annotations

import pytest
from families import BY_NAME, llama
from torch import nn

import inlay
from inlay.roles import role_by_name, roles
from inlay.targets import layer_index, resolve

DEFAULTS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "bert": ["attention.output.dense", "output.dense"],
    "vit": ["attention.o_proj", "mlp.fc2"],
    "mixtral": ["self_attn.o_proj"],
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_targets_by_the_familys_own_names(name):
    model = BY_NAME[name].build()
    names = resolve(model, None)
    assert len(names) == 2 * len(DEFAULTS[name]) == BY_NAME[name].targets
    for ending in DEFAULTS[name]:
        assert sum(n.endswith(f".{ending}") or n.endswith(ending) for n in names) >= 2
    assert set(names) == set(roles(model))


def test_default_targets_of_t5():
    names = resolve(BY_NAME["t5"].build(), None)
    for ending, count in {"SelfAttention.o": 4, "EncDecAttention.o": 2, "DenseReluDense.wo": 4}.items():
        assert sum(n.endswith(ending) for n in names) == count
    assert len(names) == 10


@pytest.mark.parametrize(
    "name, role",
    [
        ("model.layers.0.self_attn.o_proj", "o_proj"),
        ("bert.encoder.layer.3.attention.output.dense", "o_proj"),
        ("bert.encoder.layer.3.output.dense", "down_proj"),
        ("output.dense", "down_proj"),
        ("model.layers.0.mlp.down_proj", "down_proj"),
        ("model.layers.0.mlp.no_proj", None),
        ("bert.encoder.layer.3.intermediate.dense", None),
        ("model.layers.0.mlp.down_proj.extra", None),
        ("bert.pooler.dense", None),
    ],
)
def test_roles(name, role):
    assert role_by_name(name) == role


def test_all_linear_leaves_the_head_out_and_takes_conv1d():
    names = resolve(llama(), "all-linear")
    assert len(names) == 14 and "lm_head" not in names
    assert len(resolve(BY_NAME["gpt2"].build(), "all-linear")) == 8
    tuned = inlay.tune(llama(), inlay.S2FT(target_modules="all-linear"))
    assert resolve(tuned, "all-linear") == names


def test_lists_regular_expressions_layers_and_exclusions():
    model = llama(num_hidden_layers=3)
    assert resolve(model, ["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert resolve(model, ["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert resolve(model, r".*\.1\..*[qk]_proj") == [f"model.layers.1.self_attn.{x}_proj" for x in "qk"]
    assert resolve(model, ["up_proj", "q_proj"], layers_to_transform=[2, 0]) == [
        f"model.layers.{i}.{x}" for i in (0, 2) for x in ("self_attn.q_proj", "mlp.up_proj")
    ]
    assert resolve(model, ["q_proj"], layers_to_transform=1) == ["model.layers.1.self_attn.q_proj"]
    assert resolve(model, ["q_proj", "k_proj"], exclude_modules=["k_proj"], layers_to_transform=0) == [
        "model.layers.0.self_attn.q_proj"
    ]
    assert resolve(model, ["q_proj"], exclude_modules=r".*layers\.[01]\..*") == ["model.layers.2.self_attn.q_proj"]
    assert resolve(model, ["lm_head"]) == ["lm_head"]


def test_role_names_mean_the_familys_own_names():
    assert resolve(BY_NAME["gpt2"].build(), ["down_proj"]) == [f"transformer.h.{i}.mlp.c_proj" for i in range(2)]
    assert resolve(BY_NAME["opt"].build(), ["o_proj"]) == [
        f"model.decoder.layers.{i}.self_attn.out_proj" for i in (0, 1)
    ]


@pytest.mark.parametrize(
    "target, options, match",
    [
        (["o_porj"], {}, "target 'o_porj' matched no linear; did you mean 'o_proj'"),
        (["o_proj", "embed_tokens"], {}, "target 'embed_tokens' matched no linear; linears here end in"),
        (["proj"], {}, "target 'proj' matched no linear"),
        ([], {}, r"target_modules=\[\] matched no linear"),
        (r"layers\.\d+\.mlp\.down_proj", {}, "the pattern .* matched no linear of this LlamaForCausalLM"),
        ("down_proj", {}, r"regular expression for whole names.*did you mean the list \['down_proj'\]"),
        ("*proj", {}, "is no regular expression"),
        (["o_proj"], {"layers_to_transform": [0, 5]}, r"nothing to tune in layer 5; there are \[0, 1\]"),
        (["lm_head"], {"layers_to_transform": 0}, "nothing to tune in layer 0; there are no layers"),
        (["o_proj"], {"layers_to_transform": -1}, "nothing to tune in layer -1"),
        (["o_proj"], {"exclude_modules": ["o_porj"]}, "exclude_modules: 'o_porj' matched no linear; did you mean"),
        (["o_proj"], {"exclude_modules": "nothing.*"}, "exclude_modules: 'nothing.*' matched no linear"),
        (["o_proj"], {"exclude_modules": ["o_proj"]}, "matched 2 linears, but exclude_modules=.* left none"),
    ],
)
def test_what_matches_nothing(target, options, match):
    with pytest.raises(ValueError, match=match):
        resolve(llama(), target, **options)


def test_no_default_matches():
    with pytest.raises(ValueError, match=r"the defaults \('o_proj', 'down_proj'\) matched no linear.*end in \['0'\]"):
        resolve(nn.Sequential(nn.Linear(3, 3)), None)
    with pytest.raises(ValueError, match="nothing: there is no nn.Linear or Conv1D"):
        resolve(nn.Sequential(nn.Conv2d(3, 3, 1)), "all-linear")


@pytest.mark.parametrize(
    "name, index",
    [("model.layers.12.mlp.down_proj", 12), ("h.3.x.4.y", 3), ("lm_head", None), ("4.weight", 4), ("layer2.x", None)],
)
def test_layer_index(name, index):
    assert layer_index(name) == index
