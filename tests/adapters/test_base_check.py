"""Is this the base the adapter was trained on? Rounding and quantization are not another base; noise is."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from families import llama
from oracle import randomize

import inlay
from inlay.fingerprint import distance, mark


def noisy(model: torch.nn.Module, size: float, only: str = "") -> torch.nn.Module:
    random = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and only in name:
                p.add_(size * p.square().mean().sqrt() * torch.randn(p.shape, generator=random))
    return model


def base(dtype=torch.float32):
    return llama(hidden_size=64, intermediate_size=128).to(dtype)


@pytest.fixture
def saved(tmp_path):
    tuned = inlay.tune(base(), inlay.S2FT(ratio=0.2))
    randomize(tuned, 0.1)
    tuned.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_the_same_base(dtype, saved, no_warning):
    inlay.load(base(dtype), saved)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", inlay.BaseConfig("nf4", blocksize=128, double_quant=True)])
def test_quantized_is_the_same_base(kind, saved, tmp_path, no_warning):
    model = base()
    inlay.bases.quantize_linears(model, inlay.BaseConfig.of(kind))
    inlay.load(model, saved)
    inlay.load(base(), saved, base=kind)
    tuned = inlay.tune(model := base(), inlay.S2FT(ratio=0.2), base=kind)
    randomize(tuned, 0.1)
    tuned.save_pretrained(tmp_path / "packed")
    inlay.load(base(), tmp_path / "packed")
    packed = base()
    inlay.bases.quantize_linears(packed, inlay.BaseConfig.of(kind))
    tuned = inlay.tune(packed, inlay.S2FT(ratio=0.2))
    randomize(tuned, 0.1)
    tuned.save_pretrained(tmp_path / "prepacked")
    inlay.load(base(), tmp_path / "prepacked")


@pytest.mark.parametrize("size, percent", [(0.25, "(1[7-9]|2[0-9])"), (0.1, "([7-9]|1[0-2])"), (0.05, "[3-6]")])
def test_noise_is_measured_and_said(size, percent, saved):
    with pytest.warns(UserWarning, match=rf"not quite what .* off by {percent}\.\d% of their size"):
        inlay.load(noisy(base(), size), saved)


def test_noise_on_a_four_bit_base(saved):
    model = noisy(base(), 0.2)
    inlay.bases.quantize_linears(model, inlay.BaseConfig("nf4"))
    with pytest.warns(UserWarning, match="not quite what"):
        inlay.load(model, saved)


@pytest.mark.parametrize("only", ["q_proj", "layers.1.mlp.up_proj", "embed_tokens", "layers.0.mlp.down_proj"])
def test_also_where_nothing_is_tuned(only, saved):
    with pytest.warns(UserWarning, match=rf"not quite what .*{only}"):
        inlay.load(noisy(base(), 0.2, only), saved)


def test_another_base_is_an_error_still(saved):
    with pytest.raises(ValueError, match="not the base the adapter was trained on"):
        inlay.load(noisy(base(), 3.0), saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inlay.load(noisy(base(), 0.2), saved, check_base=False)


def test_an_adapter_without_marks_loads(saved, no_warning):
    file = saved / "adapter_config.json"
    config = json.loads(file.read_text())
    assert len(config["inlay"]["fingerprint"]["marks"]) > 12
    for key in ("fingerprint", "vocabulary", "unfrozen", "whole"):
        del config["inlay"][key]
    file.write_text(json.dumps(config))
    inlay.load(noisy(base(), 0.1), saved)


def test_a_second_adapter_is_compared_with_the_base_not_with_the_first(saved, no_warning):
    model = inlay.tune(base(), inlay.S2FT(ratio=0.2, update="in_place"), adapter_name="first")
    randomize(model, 1.0, name="first")
    model.set_adapter("first")
    with pytest.raises(ValueError, match="wanted one adapter on a base"):
        inlay.load(model, saved, name="second")  # the base was recognized before that


def test_merging_on_disk_says_so_too(saved, tmp_path):
    noisy(base(), 0.2).save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="base is not quite what the adapter was trained on"):
        inlay.adapters.merge_files(tmp_path / "base", saved, tmp_path / "merged")


def test_marks():
    w = torch.randn(40, 30)
    assert distance(mark(w), mark(w)) == 0 and distance(mark(w), mark(w.bfloat16())) == 0
    assert distance(mark(w), mark(w[1:])) is None
    assert 0.5 < distance(mark(w), mark(torch.randn(40, 30))) < 2
    assert distance(mark(torch.zeros(3)), mark(torch.zeros(3))) == 0
    assert len(mark(w)) < 60
