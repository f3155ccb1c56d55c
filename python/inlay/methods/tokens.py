"""What methods share that train the rows of chosen tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..pieces.token_rows import TokenEmbeddings, TokenOutputs
from ..sites import site_of
from ..targets import embeddings, output_head_names, resolve
from ..ties import each_once, sharers
from ..vocabulary import original_vocabulary
from .base import Calibration, Method, Plan


@dataclass
class TrainsTokens(Method):
    """Base of methods that train rows of tokens, of embeddings or heads.

    Attributes:
        tokens: ids of the tokens to train, or "new": all beyond those that the model's checkpoint has.
        target_modules: embeddings (or heads) by name suffixes or a regular expression; None for the method's own.
    """

    pieces: ClassVar = (TokenEmbeddings, TokenOutputs)

    tokens: Sequence[int] | str = "new"

    def __post_init__(self) -> None:
        if isinstance(self.tokens, str):
            if self.tokens != "new":
                raise ValueError(f'tokens: wanted a list of token ids, or "new", got {self.tokens!r}')
            return
        self.tokens = [int(token) for token in self.tokens]
        if not self.tokens:
            raise ValueError("tokens: wanted at least one token id, got none")
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError("tokens: wanted distinct token ids, got one twice")

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        if self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform: tokens have their rows outside the layers, got {self.layers_to_transform}; "
                "leave it out"
            )
        named = self.target_modules is not None or self.exclude_modules is not None
        paths = each_once(model, self._named(model) if named else self.tables(model))
        return Plan({site_of(model, path): partial(self._build, model=model, where=path) for path in paths})

    def tables(self, model: nn.Module) -> list[str]:
        """The modules whose rows train where no option names any."""
        raise NotImplementedError(f"{type(self).__name__} must define tables(model)")

    def _named(self, model: nn.Module) -> list[str]:
        heads, tables = output_head_names(model), embeddings(model)
        targets = self.target_modules if self.target_modules is not None else self.tables(model)
        names = resolve(model, targets, exclude_modules=self.exclude_modules, by_name=[*tables, *heads])
        wrong = [name for name in names if name not in tables and name not in heads]
        if wrong:
            raise ValueError(
                f"{wrong[0]} is no table of tokens: wanted embeddings or the output head, {[*tables, *heads]}"
            )
        return names

    def _build(self, module: nn.Module, *, model: nn.Module, where: str) -> TokenEmbeddings | TokenOutputs:
        return self._piece(module, self._indices(model, module), where)

    @staticmethod
    def _piece(module: nn.Module, indices: Tensor, where: str) -> TokenEmbeddings | TokenOutputs:
        kind = TokenEmbeddings if isinstance(module, nn.Embedding) else TokenOutputs
        return kind(module, indices, where)

    def _indices(self, model: nn.Module, module: Any) -> Tensor:
        if not isinstance(self.tokens, str):
            return torch.tensor(self.tokens, dtype=torch.int64)
        here, before = int(module.weight.shape[0]), original_vocabulary(model)
        if before is None:
            raise ValueError(
                'tokens="new": the checkpoint that this model came from is not at hand, so that nobody knows which '
                "tokens are new: pass their ids, e.g. tokens=list(range(old, len(tokenizer)))"
            )
        if before >= here:
            raise ValueError(
                f'tokens="new": the model has the {before} tokens it came with and no new one: call '
                "resize_token_embeddings(len(tokenizer)) before tune, or pass the ids of old ones"
            )
        return torch.arange(before, here)

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> TokenEmbeddings | TokenOutputs:
        indices = self.rows_held(tensors)
        if indices is None or "trainable_tokens_delta" not in tensors:
            raise ValueError(f"{where}: wanted trainable_tokens_delta, got {sorted(tensors)}; the file is incomplete")
        return self._piece(module, indices, where).load({**tensors, "token_indices": indices}, where)

    def rows_held(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """A file of PEFT's has the ids in its config alone, in the order of the rows."""
        if "token_indices" in tensors or isinstance(self.tokens, str):
            return tensors.get("token_indices")
        return torch.tensor(self.tokens, dtype=torch.int64)


def head_of(model: nn.Module) -> str | None:
    """Name of the output head of ``model``; None where it has none."""
    return next(iter(sorted(output_head_names(model))), None)


def is_tied_to(model: nn.Module, path: str, other: str) -> bool:
    """Whether two modules share their weight."""
    return other in sharers(model, [path]).get(path, ())
