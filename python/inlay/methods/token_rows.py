"""TokenRows: the embeddings of new (or chosen) tokens train, and their rows of the output head.

The method, and the files, are PEFT's trainable tokens (``TrainableTokensConfig``, ``trainable_token_indices``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..targets import input_embedding
from .base import register
from .peft_files import options_in
from .tokens import TrainsTokens, head_of, is_tied_to


@register
@dataclass
class TokenRows(TrainsTokens):
    """Train the rows of some tokens, all others stay as they are: after ``resize_token_embeddings``, those of the new.

    A head that is tied to the embeddings takes part of itself: the rows are one.

    Attributes:
        tokens: ids of the tokens to train, or "new": all beyond those that the model's checkpoint has.
        head: where the head is not tied, the rows of the same tokens train there too, without which the model does not
            learn to write them. PEFT leaves them out unless ``target_modules`` names the head.
        target_modules: None means the table that tokens are looked up in, and the head; else all that trains.
    """

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"

    head: bool = True

    def tables(self, model: nn.Module) -> list[str]:
        table, head = input_embedding(model), head_of(model)
        if table is None:
            raise ValueError(
                f"TokenRows found no embedding of tokens in this {type(model).__name__}; name one in target_modules"
            )
        return [table, head] if self.head and head is not None and not is_tied_to(model, table, head) else [table]

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], where: Path) -> TokenRows:
        ignored = ("token_indices", "init_weights")
        options = options_in(config, (), where, lambda option, value: option in ignored)
        return cls(tokens=list(config.get("token_indices") or ()), head=False, **options)

    def peft_fields(self, pieces: Mapping[str, Any]) -> dict[str, Any]:
        ids = [piece.token_indices.tolist() for piece in pieces.values()]
        return {"token_indices": ids[0], "target_modules": sorted(pieces), "init_weights": True}
