"""The model families every method is run on, at tiny random size, with a batch builder each.

Weights are random and large enough that every block matters; norms and biases are not at their degenerate values.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY, TOKENS = 97, 11
_EMBEDDING = re.compile("embed|shared")

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        build: a fresh model, in training mode, always the same weights.
        batch: arguments of its forward for a seed, with labels.
        causal: whether it is a causal language model.
        fused_loss: whether the fused loss may stand for its own loss.
        blocks: how many of each fused block ``tune`` installs.
        layers: number of blocks. targets: linears that the default targets of S2FT name.
        slack: how many times as large as the others' its own rounding errors are, fused or not.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    targets: int
    causal: bool = True
    fused_loss: bool = True
    blocks: tuple[tuple[str, int], ...] = ()
    slack: float = 1.0

    def __str__(self) -> str:
        return self.name


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights: matrices of unit gain, norms around their own value, biases that matter."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.dim() >= 2:
                embedding = 0.1 if "embed_tokens" in name else 0.3  # tied ones would drown what the blocks add
                parameter.copy_(noise * (embedding if _EMBEDDING.search(name) else parameter.shape[-1] ** -0.5))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.add_(0.2 * noise)
    return model.train()


def text_batch(seed: int, rows: int = 3, tokens: int = TOKENS) -> Batch:
    """Token ids with right padding, prompts without labels, and a label that is ignored in the middle."""
    random = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=random)
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    labels[0, 5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def class_batch(seed: int) -> Batch:
    batch = text_batch(seed)
    return {**batch, "labels": torch.tensor([0, 2, 1])}


def image_batch(seed: int) -> Batch:
    random = torch.Generator().manual_seed(1000 + seed)
    return {"pixel_values": torch.randn(3, 3, 8, 8, generator=random), "labels": torch.tensor([0, 2, 1])}


def pair_batch(seed: int) -> Batch:
    batch = text_batch(seed)
    return {**batch, "labels": text_batch(seed + 500, tokens=7)["labels"]}


_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _builder(model: str, config: str, attention: str | None = None, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = getattr(hf, config)(**options)
        if attention is not None:
            settings._attn_implementation = attention
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what is only moved below starts at random in some
            made = getattr(hf, model)(settings)
        torch.rand(1)  # a test that goes on drawing from the same seed must not draw these weights again
        return perturb(made)

    return build


def llama(**changes: Any) -> nn.Module:
    """The Llama of the table, with other options; or one of its relatives, by the ``prefix`` of its classes."""
    prefix = changes.pop("prefix", "Llama")
    return _builder(f"{prefix}ForCausalLM", f"{prefix}Config", **(_LLAMA | changes))()


def _like_llama(name: str, prefix: str, **options: Any) -> dict[str, Any]:
    return {
        "name": name,
        "build": _builder(f"{prefix}ForCausalLM", f"{prefix}Config", **(_LLAMA | options)),
        "batch": text_batch,
        "targets": 4,
    }


_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 3,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


def _blocks(norms: int, mlps: int, attentions: int, rules: int = 0) -> tuple[tuple[str, int], ...]:
    counts = {"FusedAttention": attentions, "FusedGatedMLP": mlps, "FusedRMSNorm": norms}
    counts |= {"FusedDeltaRule": rules, "FusedGatedRMSNorm": rules}
    return tuple((name, count) for name, count in counts.items() if count)


FAMILIES = [
    Family(**_like_llama("llama", "Llama"), blocks=_blocks(5, 2, 2)),
    Family(**_like_llama("qwen2", "Qwen2"), blocks=_blocks(5, 2, 2)),
    Family(**_like_llama("qwen3", "Qwen3", head_dim=8), blocks=_blocks(9, 2, 2)),
    Family(
        **_like_llama("gemma", "Gemma", head_dim=8, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh"),
        blocks=_blocks(5, 2, 2),
    ),
    Family(
        **_like_llama(
            "gemma2",
            "Gemma2",
            attention="eager",  # the only one that honours the softcap of the attention scores
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=4,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=2.0,
            tie_word_embeddings=True,
        ),
        fused_loss=False,
        blocks=_blocks(9, 2, 2),
    ),
    Family(**_like_llama("mistral", "Mistral", sliding_window=4, head_dim=8), blocks=_blocks(5, 2, 2)),
    Family(
        "gpt2",
        _builder(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        text_batch,
        targets=4,
    ),
    Family(
        "opt",
        _builder(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            pad_token_id=0,
        ),
        text_batch,
        targets=4,
    ),
    Family(
        "bert",
        _builder(
            "BertForSequenceClassification",
            "BertConfig",
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            classifier_dropout=0.0,
            **_ENCODER,
            **_NO_DROPOUT,
        ),
        class_batch,
        targets=4,
        causal=False,
        fused_loss=False,
    ),
    Family(
        "vit",
        _builder("ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4, **_ENCODER, **_NO_DROPOUT),
        image_batch,
        targets=4,
        causal=False,
        fused_loss=False,
    ),
    Family(
        "t5",
        _builder("T5ForConditionalGeneration", "T5Config", **_T5),
        pair_batch,
        targets=10,  # two encoder blocks (attention, FFN), two decoder blocks (attention twice, FFN)
        causal=False,
        fused_loss=False,
        blocks=_blocks(12, 0, 0),
    ),
    Family(
        "t5-gated",
        _builder("T5ForConditionalGeneration", "T5Config", **_T5, feed_forward_proj="gated-gelu"),
        pair_batch,
        targets=10,
        causal=False,
        fused_loss=False,
        blocks=_blocks(12, 0, 0),
    ),
    Family(
        **(_like_llama("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2) | {"targets": 2}),
        blocks=(("FusedAttention", 2), ("FusedExperts", 2), ("FusedRMSNorm", 5)),
    ),
    Family(
        **_like_llama(
            "granite",
            "Granite",
            embedding_multiplier=2.0,
            logits_scaling=3.0,
            residual_multiplier=0.5,
            attention_multiplier=0.25,
        ),
        fused_loss=False,
        blocks=_blocks(5, 2, 2),
    ),
]

#: Families of which some models have biases and others have none.
WITH_BIASES = [
    Family(**_like_llama("llama-biases", "Llama", attention_bias=True, mlp_bias=True)),
    Family(**_like_llama("granite-biases", "Granite", attention_bias=True, mlp_bias=True)),
    Family(**_like_llama("gemma-biases", "Gemma", head_dim=8, attention_bias=True)),
    Family(**_like_llama("qwen3-biases", "Qwen3", head_dim=8, attention_bias=True)),
]

#: Families of which each head of attention has a sink; transformers has no SDPA for them.
WITH_SINKS = [
    Family(
        **(
            _like_llama("gpt_oss", "GptOss", head_dim=8, sliding_window=4, num_local_experts=4, num_experts_per_tok=2)
            | {"targets": 2}
        ),
        blocks=_blocks(5, 0, 2),
    ),
    Family(**_like_llama("granite_swa", "GraniteSWA", sliding_window=4), fused_loss=False, blocks=_blocks(5, 2, 2)),
]

#: One layer of the gated delta rule, grouped, and one of attention with an output gate.
_QWEN3_5 = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
FAMILIES.append(
    Family(
        "qwen3_5",
        _builder("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", **(_LLAMA | _QWEN3_5)),
        text_batch,
        targets=4,
        blocks=_blocks(7, 2, 0, 1),
        slack=4.0,  # where keys nearly cancel its own rounding, eager or fused, is 5e-6 and more
    )
)

CAUSAL = [family for family in FAMILIES if family.causal]
BY_NAME = {family.name: family for family in (*FAMILIES, *WITH_BIASES, *WITH_SINKS)}


def prompt(seed: int = 0, tokens: int = 6, rows: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(2000 + seed)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=random)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """A batch with its floating-point inputs (images) in ``dtype``."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def eval_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch in eval mode, without labels' influence; the model's mode is left as it was."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits
    model.train(training)
    return logits
