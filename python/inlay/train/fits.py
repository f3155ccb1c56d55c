"""Whether prepared data fits a model's tables: what would crash, or read nonsense, hours into a run."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..data import TrainingData
from ..data.masking import IGNORED
from ..data.packing import PackedSamples
from ..data.room import embedding_rows, head_rows, made_for, plain_tokens

#: Rows that tables of positions may keep before the first one (OPT and RoBERTa: 2).
_ROWS_BEFORE = 8


def check_data_fits(model: Any, data: TrainingData) -> int | None:
    """Compare token ids, labels and lengths with the embeddings, the head and the positions of ``model``.

    Returns:
        positions of the model's smallest table of them that is not far larger than the data; None if it has none.

    Raises:
        ValueError: a token id or label that the model has no row for, or a sample longer than its table of positions.
            Longer than what a model without a table was made for is a warning.
    """
    _check_tokens(model, data)
    longest = max(data.lengths if data.report.highest_token < 0 else [data.report.longest], default=0)
    room, declared = _room_of_tables(model, longest), made_for(model)
    beyond = declared is not None and longest > declared
    if room is None and beyond and not _runs_at(model, longest - 1):
        room = declared
    if room is not None and longest > room:
        raise ValueError(
            f"wanted samples of at most {room} tokens, what this {type(model).__name__} has positions for, got one of "
            f"{longest}; pass max_length={room} (the first such is sample {_index_of(data, longest)})"
        )
    if beyond:
        warnings.warn(
            f"the longest sample has {longest} tokens and this model was made for {declared}; pass "
            f"max_length={declared}, or scale its rotary embeddings",
            stacklevel=3,
        )
    return room


def _index_of(data: TrainingData, longest: int) -> int:
    if isinstance(data.samples, PackedSamples):
        data = TrainingData(data.samples.samples, data.report)
    return next((index for index, length in enumerate(data.lengths) if length >= longest), -1)


# -- tokens -------------------------------------------------------------------------------------


def _check_tokens(model: Any, data: TrainingData) -> None:
    rows, logits = embedding_rows(model), head_rows(model)
    if rows is None or logits is None or 0 <= data.report.highest_token < min(rows, logits):
        return
    for index in range(len(data)):  # not counted, or one is beyond the smaller of the two
        sample = data[index]
        where = f"row {index}" if data.packed else f"sample {index}"
        _check_range(sample["input_ids"], rows, where, f"{type(model).__name__}'s embeddings", "")
        labels = [label for label in sample["labels"] if label != IGNORED]
        _check_range(labels, logits, where, f"{type(model).__name__}'s head", " as a label")


def _check_range(values: list[int], rows: int, where: str, table: str, role: str) -> None:
    wrong = next((value for value in values if not 0 <= value < rows), None)
    if wrong is not None and wrong < 0:
        raise ValueError(
            f"{where}: wanted token ids of at least 0, got {wrong}{role}; a label of {IGNORED} is not trained"
        )
    if wrong is not None:
        raise ValueError(
            f"{where}: wanted token ids below {rows}, the rows of this {table}, got {wrong}{role}; use the model's own "
            "tokenizer, or model.resize_token_embeddings(len(tokenizer))"
        )


# -- positions ----------------------------------------------------------------------------------


def _room_of_tables(model: Any, longest: int) -> int | None:
    """Positions of the smallest table of them, if one is small enough to matter to ``longest`` and its padding."""
    tables = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings <= 2 * longest + 64
    ]
    return min((table.num_embeddings - first for table, first in _positions_seen(model, tables)), default=None)


def _positions_seen(model: Any, tables: list[nn.Embedding]) -> list[tuple[nn.Embedding, int]]:
    """The tables that one tiny forward asks for successive rows, and the first of those: by use, not by name.

    A vision tower's table is not asked; one of token types is asked for one row alone.
    """
    seen: list[tuple[nn.Embedding, int]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].reshape(-1)[:3].tolist() if inputs and isinstance(inputs[0], torch.Tensor) else []
        if len(rows) == 3 and rows == list(range(rows[0], rows[0] + 3)) and isinstance(module, nn.Embedding):
            seen.append((module, rows[0]))

    if not tables:
        return seen
    hooks = [table.register_forward_pre_hook(note) for table in tables]
    try:
        falling = plain_tokens(model, (3,), torch.Generator().manual_seed(0)).sort(descending=True).values
        _forward(model, input_ids=falling.unsqueeze(0))
    except Exception:
        pass  # an input of another kind is wanted; what was seen before it failed holds all the same
    finally:
        for hook in hooks:
            hook.remove()
    return [(table, first) for table, first in seen if first <= _ROWS_BEFORE]


def _runs_at(model: Any, position: int) -> bool:
    """Whether one token at ``position`` runs where one at 0 does: tables may be buffers, not embeddings.

    On accelerators True, because an index beyond a table ends the process there; the longest batch is run anyway.
    """
    if next(model.parameters()).device.type != "cpu":
        return True
    token = plain_tokens(model, (1, 1), torch.Generator().manual_seed(0))

    def runs(at: int) -> bool:
        try:
            _forward(model, input_ids=token, position_ids=torch.tensor([[at]]))
        except (IndexError, RuntimeError):
            return False
        except Exception:
            return True  # no position_ids here: nothing learnt
        return True

    return runs(position) or not runs(0)


@torch.no_grad()
def _forward(model: Any, **inputs: torch.Tensor) -> None:
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)
    finally:
        for module, mode in modes.items():
            module.training = mode
