"""ToolkenGPT: a tool is a token, of which only the row of the output head trains.

Source: Hao, Liu, Wang, Hu, "ToolkenGPT: Augmenting Frozen Language Models with Massive Tools via Tool Embeddings",
NeurIPS 2023, arXiv:2305.11554; their rows train with Adam at a learning rate of 1e-3 for 20 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..targets import input_embedding
from .base import register
from .tokens import TrainsTokens, head_of, is_tied_to


@register
@dataclass
class ToolkenGPT(TrainsTokens):
    """Train the output rows of the tokens that stand for tools; a call is predicted, and its result written as text.

    Give the model a token per tool first (``resize_token_embeddings``). Labels name a tool's token where the text calls
    it; inputs hold the text alone, never such a token, so that its embedding does not matter: where the head is tied to
    the embeddings, the shared row trains.

    Attributes:
        tokens: ids of the tokens to train, or "new": all beyond those that the model's checkpoint has.
        target_modules: None means the output head.
    """

    peft_type: ClassVar[str] = "TOOLKEN_GPT"

    def tables(self, model: nn.Module) -> list[str]:
        head, table = head_of(model), input_embedding(model)
        if head is None:
            raise ValueError(
                f"ToolkenGPT trains rows of an output head, and this {type(model).__name__} has none; name one in "
                "target_modules, or train embeddings with inlay.TokenRows"
            )
        return [table] if table is not None and is_tied_to(model, table, head) else [head]
