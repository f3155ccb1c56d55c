"""S2FT's options: how many channels, which, on which side, in whole heads; and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import BY_NAME, llama, text_batch
from oracle import deltas_of

import inlay
from inlay.methods import METHODS
from inlay.nn.tuned_linear import TunedLinear
from inlay.select import random_groups

HEAD = 8


def chosen(model, **options) -> dict[str, list[int]]:
    tuned = inlay.tune(model, inlay.S2FT(**options))
    return {path: delta.s2ft_indices.tolist() for path, delta in deltas_of(tuned).items()}


def heads(indices: list[int], width: int = HEAD) -> list[int]:
    """The heads that ``indices`` are made of; fails if they are not whole ones."""
    numbers = sorted({index // width for index in indices})
    assert indices == [head * width + offset for head in numbers for offset in range(width)]
    return numbers


# --- how many ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, down, o", [(0.001, 1, 1), (0.03, 1, 1), (0.2, 10, 1), (0.5, 24, 2), (0.7, 34, 3), (1, 48, 4)]
)
def test_ratio_counts_channels_and_whole_heads(ratio, down, o):
    picked = chosen(llama(), ratio=ratio)
    for path, indices in picked.items():
        if path.endswith("down_proj"):
            assert len(indices) == down
        else:
            assert len(heads(indices)) == o


def test_counts_and_dicts():
    picked = chosen(llama(), channels={"o_proj": 16, "layers.0.mlp.down_proj": 7, "down_proj": 5})
    counts = {path.removeprefix("model.layers."): len(indices) for path, indices in picked.items()}
    assert counts == {"0.self_attn.o_proj": 16, "0.mlp.down_proj": 7, "1.self_attn.o_proj": 16, "1.mlp.down_proj": 5}
    picked = chosen(BY_NAME["gpt2"].build(), ratio={"o_proj": 0.5, "down_proj": 0.25})
    assert {len(indices) for path, indices in picked.items() if "attn" in path} == {16}
    assert {len(indices) for path, indices in picked.items() if "mlp" in path} == {32}


@pytest.mark.parametrize("size", [2, 4, 6, 12])
def test_groups_are_aligned(size):
    picked = chosen(llama(), ratio=0.3, granularity={"down_proj": size, "o_proj": 2})
    for path, indices in picked.items():
        width, channels = (size, 48) if path.endswith("down_proj") else (2, 32)
        assert len(heads(indices, width)) == round(0.3 * (channels // width)) > 0


# --- whole heads, with grouped queries --------------------------------------------------------------------


def test_heads_of_grouped_query_attention():
    """Four query heads share two key/value heads: each linear is cut into its own."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.5, target_modules=targets))
    for path, delta in deltas_of(tuned).items():
        picked = heads(delta.s2ft_indices.tolist())
        many = 2 if path.endswith(("q_proj", "o_proj")) else 1
        assert len(picked) == many and max(picked) < 2 * many
        assert delta.side == ("in" if path.endswith("o_proj") else "out")
        wanted = (32, HEAD * many) if delta.side == "in" else (HEAD * many, 32)
        assert delta.s2ft_values.shape == wanted


@pytest.mark.parametrize(
    "changes, query, key_value, width",
    [
        ({"num_key_value_heads": 1}, 4, 1, 8),  # one for all queries
        ({"num_key_value_heads": 4}, 4, 4, 8),
        ({"head_dim": 16}, 4, 2, 16),  # wider than hidden / heads
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}, 8, 2, 4),
    ],
)
def test_head_shapes(changes, query, key_value, width):
    picked = chosen(llama(**changes), ratio=1.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    for path, indices in picked.items():
        count = query if path.endswith(("q_proj", "o_proj")) else key_value
        assert heads(indices, width) == list(range(count))
    few = chosen(llama(**changes), ratio=0.01, target_modules=["k_proj", "o_proj"])
    assert all(len(heads(indices, width)) == 1 for indices in few.values())


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "vit", "t5", "qwen3", "gemma", "mixtral"])
def test_output_projections_of_other_families_go_by_heads(name):
    picked = chosen(BY_NAME[name].build(), ratio=0.5, target_modules=["o_proj"] if name != "t5" else None)
    for path, indices in picked.items():
        if not path.endswith("wo"):
            assert len(heads(indices)) == 2, path


def test_sides():
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2, target_modules="all-linear"))
    for path, delta in deltas_of(tuned).items():
        assert delta.side == ("in" if path.endswith(("o_proj", "down_proj")) else "out")
    method = inlay.S2FT(ratio=0.2, target_modules=["o_proj", "up_proj", "gate_proj"], side={"gate_proj": "in"})
    sides = {path.rpartition(".")[2]: delta.side for path, delta in deltas_of(inlay.tune(llama(), method)).items()}
    assert sides == {"o_proj": "in", "up_proj": "out", "gate_proj": "in"}


# --- the seed ---------------------------------------------------------------------------------------------


def test_random_choice_depends_on_the_seed_and_the_linear_alone():
    one = chosen(llama(), ratio=0.2, seed=1)
    torch.manual_seed(99)
    torch.rand(17)
    assert chosen(llama(), ratio=0.2, seed=1) == one
    assert chosen(BY_NAME["qwen2"].build(), ratio=0.2, seed=1) == one  # names and sizes are the same
    assert chosen(llama(), ratio=0.2, seed=2) != one
    reordered = chosen(llama(), ratio=0.2, seed=1, target_modules=["down_proj", "q_proj", "o_proj"])
    assert {path: reordered[path] for path in one} == one
    single = chosen(llama(), ratio=0.2, seed=1, layers_to_transform=[1])
    assert single == {path: indices for path, indices in one.items() if ".1." in path}
    down = [indices for path, indices in one.items() if path.endswith("down_proj")]
    assert down[0] != down[1]  # every layer draws its own


def test_random_choice_is_uniform_enough():
    counts = torch.zeros(48)
    for seed in range(200):
        counts[random_groups(48, 12, seed, "model.layers.0.mlp.down_proj")] += 1
    assert counts.sum() == 2400 and counts.min() >= 25 and counts.max() <= 80  # 50 expected, deviation 6


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, 2, float("nan"), float("inf"), "0.1", None, {"o_proj": 0.0}])
def test_ratio_outside_its_range(ratio):
    with pytest.raises(ValueError, match=r"ratio: wanted a fraction in \(0, 1\], got"):
        inlay.S2FT(ratio=ratio)


@pytest.mark.parametrize("channels", [0, -1, 2.5, "3", {"o_proj": 0}])
def test_channels_that_are_no_count(channels):
    with pytest.raises(ValueError, match="channels: wanted a whole number"):
        inlay.S2FT(channels=channels)


@pytest.mark.parametrize(
    "options, match",
    [
        (
            {"channels": {"down_proj": 49, "o_proj": 8}},
            r"down_proj: channels must be a multiple of 1 in \[1, 48\], got 49",
        ),
        ({"channels": 12}, r"o_proj: channels must be a multiple of 8 in \[8, 32\], got 12"),
        (
            {"channels": {"o_proj": 40, "down_proj": 1}},
            r"o_proj: channels must be a multiple of 8 in \[8, 32\], got 40",
        ),
        ({"channels": {"o_proj": 8}}, "channels=.* says nothing for model.layers.0.mlp.down_proj; add an entry"),
        ({"ratio": {"o_proj": 0.5}}, "ratio=.* says nothing for model.layers.0.mlp.down_proj"),
        ({"ratio": {"o_proj": 0.5, "down_proj": 0.5, "up_proj": 0.5}}, "ratio: 'up_proj' is no tuned linear"),
        ({"granularity": {"o_porj": 4}}, "granularity: 'o_porj' is no tuned linear; they end in"),
        ({"side": {"gate_proj": "in"}}, "side: 'gate_proj' is no tuned linear"),
        ({"granularity": 5}, "o_proj: granularity must divide its 32 channels, got 5"),
        ({"granularity": 0}, "granularity must divide"),
        ({"granularity": "heads"}, "granularity must divide"),
    ],
)
def test_options_that_do_not_fit_the_model(options, match):
    model = llama()
    with pytest.raises(ValueError, match=match):
        inlay.tune(model, inlay.S2FT(**options))
    assert not any(isinstance(module, TunedLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert float(model(**text_batch(0)).loss.detach()) > 0


@pytest.mark.parametrize(
    "options, match",
    [
        ({"strategy": "magnitude"}, "strategy: wanted one of .*'gradient'.*got 'magnitude'"),
        ({"select": "biggest"}, "select: wanted one of"),
        ({"update": "inplace"}, "update: wanted one of .*'in_place'"),
        ({"side": "input"}, "side: wanted one of"),
        ({"side": {"o_proj": "left"}}, "side: wanted one of"),
    ],
)
def test_unknown_words(options, match):
    with pytest.raises(ValueError, match=match):
        inlay.S2FT(**options)


def test_unknown_options():
    with pytest.raises(TypeError, match="S2FT has no option 'target_module'; did you mean 'target_modules'"):
        inlay.S2FT.from_dict({"target_module": ["o_proj"]})
    with pytest.raises(TypeError, match="S2FT has no option 'zzz'; it takes"):
        inlay.S2FT.from_dict({"ratio": 0.1, "zzz": 1})
    with pytest.raises(TypeError, match="ration"):
        inlay.S2FT(ration=0.1)


def test_dict_round_trip():
    method = inlay.S2FT(
        ratio={"o_proj": 0.1}, target_modules=("o_proj",), seed=3, update="in_place", layers_to_transform=(1,)
    )
    values = method.to_dict()
    assert values["target_modules"] == ["o_proj"] and values["layers_to_transform"] == [1]
    again = inlay.S2FT.from_dict(values)
    assert again.to_dict() == values and again.seed == 3
    assert set(values) == {field.name for field in dataclasses.fields(inlay.S2FT)}
    assert METHODS["S2FT"] is inlay.S2FT
