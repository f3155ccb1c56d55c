"""Small models under PEFT with S²FT, for the tests of that integration."""

from __future__ import annotations

import oracle
import torch
from families import llama, text_batch
from peft import get_peft_model

from inlay.bases import BaseConfig, quantize_linears
from inlay.integrations.peft import S2FTConfig
from inlay.integrations.peft.layer import S2FTLinear


def deep_llama(**changes):
    return llama(num_hidden_layers=3, **changes)


def wrapped(model=None, **options):
    return get_peft_model(llama() if model is None else model, S2FTConfig(**({"ratio": 0.2} | options)))


def layers_of(model) -> dict[str, S2FTLinear]:
    return {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, S2FTLinear)}


def train(model, batches, rate=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.1)
    return oracle.train(model, optimizer, batches)


def trained(model=None, first=0, **options):
    model = wrapped(model, **options)
    train(model, [text_batch(first + step) for step in range(2)])
    return model


def randomize(model, name="default", seed=0):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model).values():
            values = layer.s2ft_values[name]
            values.add_(0.1 * torch.randn(values.shape, generator=random))


def quantized(base="nf4"):
    model = llama().requires_grad_(False)
    quantize_linears(model, BaseConfig(base))
    return model
