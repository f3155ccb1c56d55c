"""What is tuned and what is not is said aloud, mixtures of experts above all."""

from __future__ import annotations

import warnings

import pytest
from families import BY_NAME, llama

import inlay
from inlay.coverage import coverage, tuned_line


def test_rows_count_every_kind_of_weight(capsys):
    model = inlay.tune(llama(), inlay.S2FT(ratio=0.2, layers_to_transform=0), base=inlay.BaseConfig("nf4"))
    rows = {row.name: row for row in coverage(model)}
    layers = len(model.model.layers)
    assert (rows["o_proj"].tuned, rows["o_proj"].count, rows["o_proj"].base) == (1, layers, "FourBit")
    assert (rows["q_proj"].tuned, rows["q_proj"].count) == (0, layers)
    assert (rows["lm_head"].tuned, rows["lm_head"].base) == (0, "float32")
    assert rows["down_proj"].shape == (model.config.hidden_size, model.config.intermediate_size)
    model.print_tuned_modules()
    out = capsys.readouterr().out
    assert f"1/{layers}" in out and f"0/{layers}" in out


def test_fused_experts_are_named_as_not_covered(capsys):
    model = BY_NAME["mixtral"].build()
    with pytest.warns(UserWarning, match=r"fused expert weights, \d+% of this Mixtral.*are not quantized, and not t"):
        inlay.tune(model, inlay.S2FT(ratio=0.2))
    model.print_tuned_modules()
    lines = [line for line in capsys.readouterr().out.splitlines() if "fused experts" in line]
    assert lines and all(line.split("]")[1].split()[1].startswith("0/") for line in lines)


def test_a_dense_model_gets_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        inlay.tune(llama(), inlay.S2FT(ratio=0.2))


def test_one_line_counts_what_is_tuned():
    model = BY_NAME["llama"].build()
    tuned = inlay.tune(model, inlay.S2FT(ratio=0.2, exclude_modules=["layers.1.mlp.down_proj"]))
    assert tuned_line(tuned) == "o_proj 2/2, down_proj 1/2"
