"""Adapter files of modules that share one weight: which of them share it here, and did in training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..methods import Method
from ..ties import sharers

#: What PEFT calls the factors of a LoRA on a head that is tied to an embedding, by the embedding's, transposed.
_TRANSPOSED = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}


def without_tied(
    model: nn.Module, grouped: Mapping[str, dict[str, Tensor]], config: Mapping[str, Any], where: Path
) -> dict[str, dict[str, Tensor]]:
    """``grouped``, an adapter file's tensors by module, each weight of ``model`` once: PEFT may write tied ones twice.

    Raises:
        ValueError: the file has something else for each of two modules that share a weight here.
    """
    kept = dict(grouped)
    if config.get("inlay") is not None:
        return kept
    there = [path for path, _ in model.named_modules() if path in kept]
    for path, others in sharers(model, there).items():
        for other in [other for other in others if other in kept and path in kept]:
            if not _same(kept[path], kept[other]):
                raise ValueError(
                    f"{where}: the adapter holds one change of {path} and another of {other}, which are one weight in "
                    f"this {type(model).__name__} (tied): load the model with tie_word_embeddings=False"
                )
            del kept[other]
    return kept


def _same(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether ``other``, of a tied module, says what ``first``, of an embedding, does."""
    expected = {
        key: first[key] if key in first else first[_TRANSPOSED[key]].t()
        for key in other
        if key in first or _TRANSPOSED.get(key) in first
    }
    return expected.keys() == other.keys() and all(value.equal(other[key]) for key, value in expected.items())


def check_tied(model: nn.Module, paths: Mapping[str, Any], config: Mapping[str, Any], method: Method) -> None:
    """ValueError if modules that share a weight here did not in training, or the other way round."""
    here, ours = sharers(model, paths), config.get("inlay")
    if ours is None:
        if here and method.peft_type == "LORA" and not config.get("ensure_weight_tying"):
            path, others = next(iter(here.items()))
            raise ValueError(
                f"PEFT trained LoRA on {path} and left {others[0]}, which is tied to it, as it was "
                "(ensure_weight_tying=False): load the model with tie_word_embeddings=False"
            )
        return
    trained = ours.get("tied") or {}
    for path in paths:
        wanted, got = sorted(trained.get(path) or ()), sorted(here.get(path, ()))
        if wanted != got:
            raise ValueError(
                f"{path} shared its weight with {wanted or 'nothing'} when the adapter was trained, and shares it with "
                f"{got or 'nothing'} here: load the model with tie_word_embeddings={bool(wanted)}"
            )
