"""Make the golden adapters beside this script: one folder for each format version, never made again once released.

adapters/base          a tiny Llama, fp32
adapters/v1/<kind>     by the release that wrote format 1; logits.safetensors holds token ids and what it answered
adapters/v2/<kind>     tensors trained whole beside the deltas
adapters/v3/<kind>     of tensors trained whole, the rows that changed alone

`python tests/golden/make_adapters.py v2` with the code whose format is to be kept. Later formats add a folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import inlay

HERE = Path(__file__).parent / "adapters"
IDS = torch.tensor([[3, 7, 11, 5, 28, 2], [9, 9, 4, 30, 17, 6]])
CONFIG = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
#: method, base and, for a classifier, how many labels
KINDS = {
    "v1": {
        "s2ft-additive": (inlay.S2FT(ratio=0.2), None, 0),
        "s2ft-in-place": (inlay.S2FT(ratio=0.2, update="in_place"), None, 0),
        "s2ft-output-channels": (inlay.S2FT(ratio=0.2, target_modules=["up_proj", "q_proj"]), None, 0),
        "lora": (inlay.LoRA(r=2, lora_alpha=3), None, 0),
        "s2ft-nf4": (inlay.S2FT(ratio=0.2), "nf4", 0),
        "s2ft-exact-nf4": (inlay.S2FT(ratio=0.2, keep="exact"), "nf4", 0),
        "lora-nf4": (inlay.LoRA(r=2), "nf4", 0),
        "lora-loftq": (inlay.LoRA(r=2, init="loftq"), "nf4", 0),
    },
    "v2": {
        "s2ft-head": (lambda: inlay.S2FT(ratio=0.2), None, 3),
        "lora-head-nf4": (lambda: inlay.LoRA(r=2), "nf4", 3),
        "lora-embeddings": (lambda: inlay.LoRA(r=2, modules_to_save=["embed_tokens", "norm"]), None, 0),
        "s2ft-unfrozen": (lambda: inlay.S2FT(ratio=0.2), None, 0),
    },
    "v3": {
        "full-rows": (lambda: inlay.Full(), None, 0),
        "freeze-layers-rows": (lambda: inlay.FreezeLayers(layers=1), None, 0),
    },
}


def base_model(labels: int = 0) -> torch.nn.Module:
    """The base in ``adapters/base``; with ``labels`` a classifier, whose head is random and not stored."""
    kind = transformers.LlamaForSequenceClassification if labels else transformers.LlamaForCausalLM
    options = {"num_labels": labels} if labels else {}
    model = kind.from_pretrained(HERE / "base", dtype=torch.float32, **options)
    model.config._name_or_path = model.name_or_path = ""  # no path of this machine in the files
    return model


def answer(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def make(kind: str, folder: Path, method, base: str | None, labels: int) -> None:
    model = inlay.tune(base_model(labels), method() if callable(method) else method, base=base)
    random = torch.Generator().manual_seed(41)
    if kind == "s2ft-unfrozen":
        model.model.norm.weight.requires_grad_(True)
        model.lm_head.weight.requires_grad_(True)
    rows = folder.parent.name == "v3"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                change = 0.2 * torch.randn(parameter.shape, generator=random)
                if rows and parameter.dim() > 1:
                    change[::2] = 0
                parameter.add_(change)
    model.save_pretrained(str(folder), **({"delta": True} if rows else {}))
    (folder / "README.md").unlink()
    save_file({"ids": IDS, "logits": answer(model).contiguous()}, folder / "logits.safetensors")


def main(version: str) -> None:
    if not (HERE / "base").exists():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        model.save_pretrained(HERE / "base")
        (HERE / "base" / "generation_config.json").unlink(missing_ok=True)
    for kind, (method, base, labels) in KINDS[version].items():
        make(kind, HERE / version / kind, method, base, labels)


if __name__ == "__main__":
    main(sys.argv[1])
