"""Verify that two models give the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Verification:
    """What :func:`verify` found.

    Attributes:
        max_logit_diff: largest ``|Δlogit|`` over all prompts and positions.
        tokens_equal: whether greedy continuations agree on every prompt.
        tokens_agreeing: fraction of greedy tokens that agree.
        prompts: how many prompts were compared.
    """

    max_logit_diff: float
    tokens_equal: bool
    tokens_agreeing: float
    prompts: int

    def __str__(self) -> str:
        return (
            f"max |Δlogit| {self.max_logit_diff:.3e} over {self.prompts} prompts, "
            f"greedy tokens {'equal' if self.tokens_equal else f'{self.tokens_agreeing:.1%} equal'}"
        )


@torch.no_grad()
def verify(
    first: nn.Module,
    second: nn.Module,
    prompts: Sequence[str | Tensor],
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 16,
) -> Verification:
    """Compare logits and greedy continuations of two models, e.g. base + adapter against the merged model.

    Args:
        prompts: texts (with a ``tokenizer``) or token ids ``[T]`` or ``[1, T]``.
        max_new_tokens: length of the greedy continuation; 0 compares logits only, as for a model of no language.

    Raises:
        ValueError: no prompts, or texts without a tokenizer, or logits of different shapes.
    """
    if not prompts:
        raise ValueError("prompts: wanted at least one prompt, got none")
    was_training = [model.training for model in (first, second)]
    first.eval(), second.eval()
    worst, agreeing, total = 0.0, 0, 0
    try:
        for prompt in prompts:
            ids = _token_ids(prompt, tokenizer).to(next(first.parameters()).device)
            a, b = (_logits(model(input_ids=ids)) for model in (first, second))
            if a.shape != b.shape:
                raise ValueError(f"wanted logits of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
            difference = (a - b).abs().max().item()
            worst = difference if difference != difference else max(worst, difference)
            count = max_new_tokens if a.dim() == 3 and a.shape[-1] > int(ids.max()) else 0  # no tokens, no text
            ours, theirs = (greedy(model, ids, count) for model in (first, second))
            agreeing += sum(x == y for x, y in zip(ours, theirs, strict=True))
            total += len(ours)
    finally:
        for model, training in zip((first, second), was_training, strict=True):
            model.train(training)
    return Verification(worst, agreeing == total, agreeing / total if total else 1.0, len(prompts))


def _logits(output: Any) -> Tensor:
    """Logits in fp32; of a question answerer those of starts and ends, ``[1, T, 2]``."""
    if (logits := getattr(output, "logits", None)) is not None:
        return logits.float()
    return torch.stack([output.start_logits, output.end_logits], -1).float()


def greedy(model: nn.Module, ids: Tensor, count: int) -> list[int]:
    """``count`` greedy tokens after ``ids [1, T]``; runs on past any end token, so that both lists are as long."""
    tokens: list[int] = []
    for _ in range(count):
        token = int(model(input_ids=ids).logits[0, -1].argmax())
        tokens.append(token)
        ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
    return tokens


def _token_ids(prompt: str | Tensor, tokenizer: Any) -> Tensor:
    if isinstance(prompt, Tensor):
        return prompt.reshape(1, -1)
    if tokenizer is None:
        raise ValueError("prompts are texts: pass tokenizer=..., or give token ids")
    return tokenizer(prompt, return_tensors="pt")["input_ids"]
