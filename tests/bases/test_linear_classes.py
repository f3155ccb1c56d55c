"""Subclasses of nn.Linear: those that compute x·Wᵀ + b are linears, the others are left alone."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch
import transformers as hf
from torch import nn

import inlay
from inlay.bases import QuantizedLinear
from inlay.bases.linear import computes_linear
from inlay.targets import resolve


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-50, 50)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + self.training


class Routing(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1), x


class Written(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Renamed(nn.Linear):
    pass


@pytest.mark.parametrize("kind, is_one", [(Clamped, 0), (Noisy, 0), (Routing, 0), (Written, 1), (Renamed, 1)])
def test_a_subclass_is_judged_by_what_it_computes(kind, is_one):
    assert computes_linear(kind(8, 8)) == bool(is_one)
    model = nn.Sequential(nn.Linear(8, 8), kind(8, 8))
    names = ["0", "1"] if is_one else ["0"]
    assert resolve(model, "all-linear") == names == list(inlay.BaseConfig("nf4").names(model))


def linear_subclasses() -> list[type]:
    """Every subclass of nn.Linear that the installed transformers defines in a model's file."""
    found = {}
    for module in pkgutil.walk_packages(hf.models.__path__, "transformers.models."):
        if ".modeling_" not in module.name:
            continue
        source = importlib.util.find_spec(module.name).origin
        with open(source, encoding="utf-8") as file:
            if "Linear):" not in file.read():
                continue
        try:
            members = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        except Exception:  # wants a package that is not installed
            continue
        found |= {kind.__qualname__: kind for _, kind in members if issubclass(kind, nn.Linear)}
    return list(found.values())


def test_transformers_own_subclasses():
    judged = {}
    for kind in linear_subclasses():
        made = kind.__new__(kind)
        nn.Linear.__init__(made, 8, 8)
        judged[kind.__name__] = computes_linear(made)
    assert judged["FalconLinear"] and not judged["Llama4Router"] and not judged["DeepseekV4GroupedLinear"], judged


def test_falcon_quantizes_while_it_loads(tmp_path):
    config = hf.FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    hf.FalconForCausalLM(config).save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=inlay.QuantizationConfig("nf4"), dtype=torch.float32
    )
    dense = inlay.tune(hf.FalconForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), inlay.LoRA(r=2), base="nf4")
    assert sum(isinstance(module, QuantizedLinear) for module in loaded.modules()) == 8
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, dense.eval()(ids).logits)
