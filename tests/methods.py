"""The methods every invariant runs on: one row each. A new method adds its row here and gets every test of
tests/test_invariants.py, the several-process runs and the estimates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from families import BY_NAME as BY_NAME_OF_FAMILIES
from families import FAMILIES, WITH_BIASES, text_batch
from torch import Tensor, nn

import inlay
from inlay.methods import Method
from inlay.nn.whole import begin_all

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
        whole: it trains tensors of the base itself, in the base's dtype.
        model: options of the Llama it is tried on, where the usual one has nothing for it.
        data: it chooses by calibration batches.
        families: the families it can be tried on; None for all.
        below: it trains below the blocks, whichever of them ``layers_to_transform`` names.
    """

    name: str
    make: Callable[..., Method]
    base: str | inlay.BaseConfig | None = None
    shares: bool = True
    keeps_base: bool = True
    exports: bool = True
    dropout: bool = False
    whole: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    data: bool = False
    families: tuple[str, ...] | None = None
    below: bool = False

    def __str__(self) -> str:
        return self.name


def _s2ft(**options: Any) -> Callable[..., Method]:
    return lambda **more: inlay.S2FT(**({"ratio": 0.25} | options | more))


def _lora(**options: Any) -> Callable[..., Method]:
    return lambda **more: inlay.LoRA(**({"r": 4, "lora_alpha": 8} | options | more))


def _experts(**options: Any) -> Callable[..., Method]:
    return _lora(**({"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]} | options))


def _on_experts(**options: Any) -> Callable[..., Method]:
    return _s2ft(**({"target_parameters": ["experts.down_proj"]} | options))


def _with(method: type[Method], **options: Any) -> Callable[..., Method]:
    return lambda **more: method(**(options | more))


def _lofit() -> Callable[..., Method]:
    return _with(inlay.LoFiT, heads=0.5, strategy="random")


def _sct(**options: Any) -> Callable[..., Method]:
    return _with(inlay.SCT, **({"strategy": "random", "channels": 0.25} | options))


def _r_adapter(**options: Any) -> Callable[..., Method]:
    return _with(inlay.RAdapter, **({"r": 4, "ema": 0.0} | options))


#: A Llama with biases, and the families that have some.
BIASES = {"attention_bias": True, "mlp_bias": True}
BIASED = ("qwen2", "gpt2", "opt", "bert", "vit", *(family.name for family in WITH_BIASES))

#: Families whose attention outputs have one.
OUTPUT_BIASED = ("gpt2", "opt", "bert", "vit", *(family.name for family in WITH_BIASES))

#: Families whose MLPs are linears.
DENSE_MLP = tuple(family.name for family in FAMILIES if family.name != "mixtral")

#: Families with experts, and options of a model with some.
MIXTURES = ("mixtral",)
MIXTURE = {"prefix": "Mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}

#: Families of text, and those of them that write some.
TEXT = tuple(family.name for family in FAMILIES if family.name != "vit")
WRITING = tuple(name for name in TEXT if name != "bert")
#: Every family's table of tokens.
TABLES = r".*(embed_tokens|wte|word_embeddings|shared)"


def _on_tokens(method: type[Method], **options: Any) -> Callable[..., Method]:
    return _with(method, tokens=list(range(3, 40)), **options)


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
    Row("paca", lambda **more: inlay.PaCA(**({"r": 6, "paca_alpha": 12} | more))),
    Row("paca-nf4", lambda **more: inlay.PaCA(**({"r": 6} | more)), base="nf4"),
    Row("neft", lambda **more: inlay.NeFT(**({"ratio": 0.2, "probe_steps": 4} | more)), data=True),
    Row("spafit", lambda **more: inlay.SPAFIT(**({"r": 4, "strata": (0.0, 0.5)} | more)), exports=False, model=BIASES),
    Row("surgical", _with(inlay.Surgical, layers=1), whole=True, exports=False, data=True),
    Row("full", _with(inlay.Full), whole=True, exports=False),
    Row("full-fp32", _with(inlay.Full, rounding="fp32"), exports=False),
    Row("bitfit", _with(inlay.BitFit), exports=False, model=BIASES, families=BIASED),
    Row("bitfit-nf4", _with(inlay.BitFit), base="nf4", exports=False, model=BIASES, families=BIASED),
    Row("ln-tuning", _with(inlay.LNTuning), exports=False),
    Row("freeze-layers", _with(inlay.FreezeLayers, layers=1), whole=True, exports=False),
    Row("telly", _with(inlay.Telly, frozen_layers=1), whole=True, exports=False),
    Row("lisa", _with(inlay.LISA, layers=1, every=1), whole=True, exports=False),
    Row("lisa-blocks", _with(inlay.LISA, layers=1, every=2, embeddings=False), whole=True, exports=False),
    Row("green-trainer", _with(inlay.GreenTrainer, rho=0.6, every=3, cost="flops"), whole=True, exports=False),
    Row(
        "subtuning",
        _with(inlay.SubTuning, layers=1, probe_steps=3),
        whole=True,
        exports=False,
        data=True,
    ),
    Row("cofitune", _with(inlay.CoFiTune, depth=(0.5, 1.0), modules="both"), whole=True, exports=False, data=True),
    Row("hft", _with(inlay.HFT, redraw_every=2), whole=True, exports=False),
    Row("ia3", _with(inlay.IA3), exports=False),
    Row("ia3-nf4", _with(inlay.IA3), base="nf4", exports=False),
    Row("lofit", _lofit(), exports=False, model=BIASES, families=OUTPUT_BIASED),
    Row("lofit-data", _with(inlay.LoFiT, heads=3), data=True, exports=False, model=BIASES, families=OUTPUT_BIASED),
    Row("lofit-int8", _lofit(), base="int8", exports=False, model=BIASES, families=OUTPUT_BIASED),
    Row("lofit-gates", _with(inlay.LoFiT, stage="gates"), exports=False),
    Row("sct", _sct()),
    Row("sct-data", _with(inlay.SCT, channels=6), data=True),
    Row("sct-both-nf4", _sct(target_modules=["o_proj", "down_proj"], channels=8), base="nf4", families=DENSE_MLP),
    Row("r-adapter", _r_adapter(drop_path=0.0, eval_scale=1.0)),
    Row("r-adapter-full", _r_adapter(drop_path=0.0, eval_scale=1.0, r=32), base="int8"),
    Row("r-adapter-drop", _r_adapter(), dropout=True),
    Row("ssf", _with(inlay.SSF), exports=False),
    Row("ssf-nf4", _with(inlay.SSF), base="nf4", exports=False),
    Row("token-rows", _on_tokens(inlay.TokenRows), exports=False, families=TEXT, below=True),
    Row("token-rows-nf4", _on_tokens(inlay.TokenRows), base="nf4", exports=False, families=TEXT, below=True),
    Row("token-rows-input", _on_tokens(inlay.TokenRows, head=False), exports=False, families=("llama",), below=True),
    Row("toolken-gpt", _on_tokens(inlay.ToolkenGPT), families=WRITING, below=True),
    Row("lora-experts", _experts(target_modules=[]), families=MIXTURES, model=MIXTURE),
    Row("lora-some-experts", _experts(experts=[0, 3]), families=MIXTURES, model=MIXTURE),
    Row("lora-experts-nf4", _experts(), base="nf4", families=MIXTURES, model=MIXTURE),
    Row("s2ft-experts", _on_experts(target_modules=[]), exports=False, families=MIXTURES, model=MIXTURE),
    Row(
        "s2ft-some-experts",
        _on_experts(experts=[1, 2], strategy="weight"),
        exports=False,
        families=MIXTURES,
        model=MIXTURE,
    ),
    Row("lora-embedding", _lora(embeddings=True), families=TEXT, below=True),
    Row("s2ft-embedding", _s2ft(target_modules=TABLES), exports=False, families=TEXT, below=True),
    Row(
        "ssf-shift",
        _with(inlay.SSF, shift=True),
        base="int8",
        exports=False,
        model=BIASES,
        families=("gpt2", "opt", "bert", "vit"),
    ),
)
BY_NAME = {row.name: row for row in ROWS}


def data_for(row: Row, batch: Callable[[int], Mapping[str, Any]] = text_batch) -> list[Mapping[str, Any]] | None:
    """The calibration batches that a row chooses by, None if it does not."""
    return [batch(seed) for seed in (900, 901, 900)] if row.data else None  # the last, maybe held out, is in the others


def families_of(row: Row) -> tuple[str, ...]:
    """Names of the families that a row is tried on."""
    return row.families or tuple(family.name for family in FAMILIES)


#: Families that every change is tried on; the others are slow tests.
QUICK = ("llama", "gpt2", "bert", "t5", "gemma2")


def pairs(rows: Iterable[Row]) -> list[Any]:
    """Each row with each of its families, as pytest's parameters."""
    return [
        pytest.param(
            row, BY_NAME_OF_FAMILIES[name], id=f"{row}-{name}", marks=() if name in QUICK else (pytest.mark.slow,)
        )
        for row in rows
        for name in families_of(row)
    ]


def trainables(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def shake(model: nn.Module, size: float = 0.05, seed: int = 0) -> nn.Module:
    """Change everything that trains by about ``size``, as training would."""
    random = torch.Generator().manual_seed(4000 + seed)
    begin_all(model)
    with torch.no_grad():
        for parameter in trainables(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=random).to(parameter.dtype))
    return model
