"""The methods the benchmarks compare: how each turns a model into a training step. One function each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Built:
    """A model ready to train, and its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def inlay_s2ft(model: nn.Module) -> Built:
    """S2FT on o_proj and down_proj, 3% of the channels, additive."""
    import inlay

    inlay.tune(model, inlay.S2FT(ratio=0.03))
    return Built(model, inlay.optim.AdamW(_trainable(model), lr=1e-4))


def inlay_s2ft_in_place(model: nn.Module) -> Built:
    """The same, in the paper's in-place form."""
    import inlay

    inlay.tune(model, inlay.S2FT(ratio=0.03, update="in_place"))
    return Built(model, inlay.optim.AdamW(_trainable(model), lr=1e-4))


def peft_lora(model: nn.Module) -> Built:
    """PEFT LoRA, r=16 on all linears, its defaults otherwise."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    return Built(tuned, torch.optim.AdamW(_trainable(tuned), lr=1e-4))


def full(model: nn.Module) -> Built:
    """Full fine-tuning with torch's AdamW, states in the weights' dtype."""
    model.requires_grad_(True)
    return Built(model, torch.optim.AdamW(model.parameters(), lr=1e-5))


METHODS: dict[str, Callable[[nn.Module], Built]] = {
    "inlay-s2ft": inlay_s2ft,
    "inlay-s2ft-in-place": inlay_s2ft_in_place,
    "peft-lora": peft_lora,
    "full": full,
}
