"""Whether prepared data fits a model's tables: what would crash, or read nonsense, hours into a run."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

from ..data import TrainingData

#: Names of tables of learned positions.
_POSITIONS = re.compile(r"(?:.*\.)?(wpe|\w*position\w*|\w*pos_emb\w*)$")


def check_data_fits(model: Any, data: TrainingData) -> None:
    """Compare token ids and lengths with the embeddings and positions of ``model``.

    Raises:
        ValueError: a token id or label without a row in the embeddings, or a sample longer than a table of learned
            positions. Longer than what a rotary model was made for is a warning.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if data.report.highest_token >= rows:
        index, token = _first_beyond(data, rows)
        raise ValueError(
            f"sample {index}: wanted token ids below {rows}, the rows of this {type(model).__name__}'s embeddings, got "
            f"{token}; use the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer))"
        )
    longest = data.report.longest
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name):
            room = _room(model, module)
            if longest > room:
                raise ValueError(
                    f"wanted samples of at most {room} tokens, what {name} has positions for, got one of {longest}; "
                    f"pass max_length={room}"
                )
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(made_for, int) and longest > made_for:
        warnings.warn(
            f"the longest sample has {longest} tokens and this model was made for {made_for}; pass "
            f"max_length={made_for}, or scale its rotary embeddings",
            stacklevel=3,
        )


def _room(model: Any, table: nn.Embedding) -> int:
    """Positions of a table: its rows, without those that some keep before the first."""
    given = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    extra = table.num_embeddings - given if isinstance(given, int) else 0
    return table.num_embeddings - extra if 0 <= extra <= 2 else table.num_embeddings


def _first_beyond(data: TrainingData, rows: int) -> tuple[int, int]:
    for index in range(len(data)):
        sample = data[index]
        highest = max(*sample["input_ids"], *sample["labels"])
        if highest >= rows:
            return index, highest
    return -1, data.report.highest_token
