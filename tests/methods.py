"""The methods every invariant runs on: one row each. A new method adds its row here and gets every test of
tests/test_invariants.py, the several-process runs and the estimates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.methods import Method

NESTED = inlay.BaseConfig("nf4", double_quant=True, blocksize=32)


@dataclass(frozen=True)
class Row:
    """One method with its options and base.

    Attributes:
        make: the config; keyword arguments are further options of it.
        base: what the frozen linears are quantized to.
        shares: other adapters may live beside it on one base.
        keeps_base: tuning alone changes no logit (of the quantized model, where there is a base).
        exports: it is a LoRA to the last bit, for other libraries.
        dropout: its forward in training mode draws random numbers.
    """

    name: str
    make: Callable[..., Method]
    base: str | inlay.BaseConfig | None = None
    shares: bool = True
    keeps_base: bool = True
    exports: bool = True
    dropout: bool = False

    def __str__(self) -> str:
        return self.name


def _s2ft(**options: Any) -> Callable[..., Method]:
    return lambda **more: inlay.S2FT(**({"ratio": 0.25} | options | more))


def _lora(**options: Any) -> Callable[..., Method]:
    return lambda **more: inlay.LoRA(**({"r": 4, "lora_alpha": 8} | options | more))


ROWS = (
    Row("s2ft", _s2ft()),
    Row("s2ft-output", _s2ft(target_modules="all-linear", side="out", granularity=1)),
    Row("s2ft-in-place", _s2ft(update="in_place"), shares=False),
    Row("s2ft-nf4", _s2ft(), base="nf4"),
    Row("s2ft-int8", _s2ft(), base="int8"),
    Row("s2ft-exact", _s2ft(keep="exact"), base="nf4", shares=False, keeps_base=False, exports=False),
    Row("s2ft-head", _s2ft(modules_to_save=["lm_head"])),
    Row("lora", _lora()),
    Row("lora-rslora", _lora(use_rslora=True)),
    Row("lora-dropout", _lora(lora_dropout=0.25), dropout=True),
    Row("lora-nf4", _lora(), base=NESTED),
    Row("lora-fp4", _lora(), base="fp4"),
    Row("lora-int8", _lora(), base="int8"),
    Row("loftq", _lora(init="loftq", loftq_iterations=2), base="nf4", keeps_base=False, exports=False),
)
BY_NAME = {row.name: row for row in ROWS}


def trainables(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def shake(model: nn.Module, size: float = 0.05, seed: int = 0) -> nn.Module:
    """Change everything that trains by about ``size``, as training would."""
    random = torch.Generator().manual_seed(4000 + seed)
    with torch.no_grad():
        for parameter in trainables(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=random).to(parameter.dtype))
    return model
