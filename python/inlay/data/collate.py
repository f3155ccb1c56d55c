"""Batches: right padding, and the attention mask that is better left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .masking import IGNORED, Sample
from .room import embedding_rows


@dataclass
class Collator:
    """Pads samples to one length, a multiple of `multiple_of`, on the right.

    `attention_mask=False` is right for decoder-only causal models and much faster there: a real
    token sees only what is to its left, padding is only to its right, so nothing can leak, and
    padding itself has no label. Without a mask, SDPA takes its causal path, which skips half of
    the scores and builds no [batch, 1, length, length] tensor.
    """

    pad_token_id: int
    attention_mask: bool = False
    multiple_of: int = 8
    widest: int | None = None  # positions of the model: padding stays below

    @classmethod
    def for_model(cls, model: Any, tokenizer: Any, widest: int | None = None, mask: bool = False) -> Collator:
        """``mask``: pass an attention mask although the model could go without; padding is dropped by it."""
        pad, rows = tokenizer.pad_token_id, embedding_rows(model)
        # Any id that has a row will do where nothing is ever read; EOS exists for every tokenizer we accept, and a pad
        # token may have been added to the tokenizer alone.
        if pad is None or (rows is not None and pad >= rows):
            pad = tokenizer.eos_token_id
        return cls(pad, attention_mask=mask or needs_attention_mask(model), widest=widest)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        width = -(-longest // self.multiple_of) * self.multiple_of
        if self.widest is not None and "position_ids" not in samples[0]:
            width = max(longest, min(width, self.widest))
        batch: dict[str, Any] = {
            "input_ids": _pad(samples, "input_ids", width, self.pad_token_id),
            "labels": _pad(samples, "labels", width, IGNORED),
        }
        if "number" in samples[0]:
            batch["number"] = torch.tensor([sample["number"][0] for sample in samples])
        if "position_ids" in samples[0]:  # packed: padding is one more sample, which nothing is learnt from
            rows = [s["position_ids"] + list(range(width - len(s["position_ids"]))) for s in samples]
            batch["position_ids"] = torch.tensor(rows)
            batch["use_cache"] = False  # with a cache transformers does not look for restarts, and samples would mix
        elif self.attention_mask:
            lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
            batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        return batch


def needs_attention_mask(model: Any) -> bool:
    """False only where right padding provably cannot be seen: causal language models."""
    config = getattr(model, "config", None)
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and not getattr(
        config, "is_encoder_decoder", False
    )
    bidirectional = getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True)
    # The load-balancing loss of a mixture of experts averages over tokens, padding included unless masked.
    routed = getattr(config, "output_router_logits", False)
    return bool(not causal or bidirectional or routed)


def count_padding(input_ids: torch.Tensor, labels: torch.Tensor, pad_token_id: int) -> int:
    """Padding positions of a right-padded batch: the trailing run of unlabelled pad tokens of each row."""
    padding = (input_ids == pad_token_id) & (labels == IGNORED)
    return int(padding.flip(-1).long().cumprod(-1).sum())


def _pad(samples: Sequence[Sample], key: str, width: int, value: int) -> torch.Tensor:
    return torch.tensor([sample[key] + [value] * (width - len(sample[key])) for sample in samples])
