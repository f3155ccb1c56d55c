"""The methods the benchmarks compare: how each turns a model into a training step. One function each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def inlay_int8(build: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Built]:
    """A method with its frozen products in 8 bits."""

    def built(model: nn.Module) -> Built:
        import inlay

        inlay.tune(model, build(inlay), compute="int8")
        return Built(model, inlay.optim.AdamW(_trainable(model), lr=1e-4))

    return built


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


def inlay_lora(model: nn.Module) -> Built:
    """LoRA, r=16 on all linears, on the dense model."""
    import inlay

    inlay.tune(model, inlay.LoRA(r=16, lora_alpha=32))
    return Built(model, inlay.optim.AdamW(_trainable(model), lr=1e-4))


def inlay_whole(name: str, **options: Any) -> Callable[[nn.Module], Built]:
    """A method that trains weights whole, in bf16 with AdamW's exact residual; the original is kept beside them."""

    def build(model: nn.Module) -> Built:
        import inlay

        inlay.tune(model, getattr(inlay, name)(**options))
        return Built(model, inlay.optim.AdamW(_trainable(model), lr=1e-5, rounding="residual"))

    return build


def torch_paca(model: nn.Module) -> Built:
    """PaCA in plain torch, as many random columns of o_proj and down_proj as S2FT trains; bf16 as the model is."""
    import _paca

    _paca.install(model, _paca.channels_of_s2ft(model))
    return Built(model, torch.optim.AdamW(_trainable(model), lr=1e-4))


def peft_paca(model: nn.Module) -> Built:
    """PEFT's PaCA on o_proj and down_proj, with the mean of S2FT's channels, since it takes one number for all."""
    import _paca
    import peft

    if not hasattr(peft, "PacaConfig"):
        raise SystemExit(f"peft-paca: wanted a PEFT with PacaConfig (0.22), got PEFT {peft.__version__}")
    channels = _paca.channels_of_s2ft(model).values()
    r = round(sum(channels) / len(channels))
    config = peft.PacaConfig(r=r, paca_alpha=r, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    return Built(tuned, torch.optim.AdamW(_trainable(tuned), lr=1e-4))


def inlay_nf4(model: nn.Module) -> nn.Module:
    """``model`` with its linears in inlay's NF4 with double quantization."""
    from inlay.bases import BaseConfig, quantize_linears

    quantize_linears(model, BaseConfig("nf4", double_quant=True))
    return model


def bitsandbytes_nf4(model: nn.Module) -> nn.Module:
    """``model`` with its linears in bitsandbytes' NF4 with double quantization, as transformers loads it."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            made = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=module.weight.dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            made.weight = bnb.nn.Params4bit(
                module.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
            ).to(module.weight.device)
            made.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made)
    model.is_loaded_in_4bit = True
    return model


def _by_unsloth(model: nn.Module, four_bit: bool) -> nn.Module:
    """``model`` as Unsloth loads it, from a folder: weights, and a tokenizer of as many words, which it asks for."""
    import tempfile

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from unsloth import FastLanguageModel

    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        unk_token="w0",
        pad_token="w1",
        bos_token="w2",
        eos_token="w3",
    )
    dtype, length = next(model.parameters()).dtype, model.config.max_position_embeddings
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
        options = {"max_seq_length": length, "dtype": dtype, "load_in_4bit": four_bit, "local_files_only": True}
        return FastLanguageModel.from_pretrained(folder, **options)[0]


def unsloth_bf16(model: nn.Module) -> nn.Module:
    """``model`` as Unsloth loads it, dense."""
    return _by_unsloth(model, four_bit=False)


def unsloth_nf4(model: nn.Module) -> nn.Module:
    """``model`` as Unsloth loads it, its linears in bitsandbytes' NF4 with double quantization."""
    return _by_unsloth(model, four_bit=True)


def unsloth_lora(model: nn.Module) -> Built:
    """Unsloth's LoRA, r=16 on all linears, without checkpointing, as the others here."""
    from unsloth import FastLanguageModel

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = {"target_modules": linears, "lora_dropout": 0, "bias": "none", "use_gradient_checkpointing": False}
    tuned = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, **options)
    return Built(tuned, torch.optim.AdamW(_trainable(tuned), lr=1e-4))


#: What turns a dense model into the method's base; not counted as part of the method.
LOADERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "inlay-qlora": inlay_nf4,
    "inlay-s2ft-nf4": inlay_nf4,
    "peft-qlora": bitsandbytes_nf4,
    "unsloth-lora": unsloth_bf16,
    "unsloth-qlora": unsloth_nf4,
}

METHODS: dict[str, Callable[[nn.Module], Built]] = {
    "inlay-s2ft": inlay_s2ft,
    "inlay-s2ft-in-place": inlay_s2ft_in_place,
    "inlay-s2ft-int8": inlay_int8(lambda inlay: inlay.S2FT(ratio=0.03)),
    "inlay-lora-int8": inlay_int8(lambda inlay: inlay.LoRA(r=16, lora_alpha=32)),
    "inlay-lora": inlay_lora,
    "inlay-qlora": inlay_lora,
    "inlay-s2ft-nf4": inlay_s2ft,
    "inlay-full": inlay_whole("Full"),
    "inlay-freeze-layers": inlay_whole("FreezeLayers", layers=0.25),
    "inlay-hft": inlay_whole("HFT"),
    "inlay-lisa": inlay_whole("LISA", layers=2),
    "inlay-lisa-blocks": inlay_whole("LISA", layers=2, embeddings=False),
    "inlay-green": inlay_whole("GreenTrainer", rho=0.5),
    "inlay-ln-tuning": inlay_whole("LNTuning"),
    "inlay-ssf": inlay_whole("SSF"),
    "inlay-ia3": inlay_whole("IA3"),
    "peft-lora": peft_lora,
    "peft-qlora": peft_lora,
    "peft-paca": peft_paca,
    "torch-paca": torch_paca,
    "full": full,
    "unsloth-lora": unsloth_lora,
    "unsloth-qlora": unsloth_lora,
}


def load(method: str, model: nn.Module) -> nn.Module:
    """The base that ``method`` trains on, made from a dense ``model``."""
    return LOADERS[method](model) if method in LOADERS else model
