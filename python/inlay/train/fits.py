"""Whether prepared data fits a model's tables: what would crash, or read nonsense, hours into a run."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..data import TrainingData
from ..data.masking import IGNORED
from ..data.packing import PackedSamples
from ..data.room import embedding_rows, head_rows, made_for, plain_tokens
from ..data.tokens import Tokens
from ..nn.modes import evaluating

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
    if room is None and beyond and not _runs_with(model, longest):
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


def warn_if_generation_goes_on(model: Any, tokenizer: Any, data: TrainingData) -> None:
    """Warn if turns end in a special token at which ``model.generate`` would not stop."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(known if isinstance(known, list | tuple) else [known])}
    special = Tokens(tokenizer).special_ids
    ends = {labels[-1] for index in range(min(len(data), 8)) if (labels := data[index]["labels"])} & special
    if ends and not ends & stops:
        end = min(ends)
        warnings.warn(
            f"turns end in {tokenizer.decode([end])!r} ({end}), at which generation does not stop: set "
            f"tokenizer.eos_token, or model.generation_config.eos_token_id = {sorted((stops | {end}) - {None})}",
            stacklevel=3,
        )


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


class _Lookups(TorchFunctionMode):
    """Notes the tables that are asked for successive rows: (rows of the table, the first one asked for).

    By use, not by name or class: positions may be worked out by the caller or inside a subclass of nn.Embedding. A
    vision tower's table is not asked at all, one of token types for one row alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding and len(args) > 1:
            asked = args[0].reshape(-1)[:3].tolist()
            if len(asked) == 3 and asked == list(range(asked[0], asked[0] + 3)) and asked[0] <= _ROWS_BEFORE:
                self.seen.append((args[1].shape[0], asked[0]))
        return func(*args, **(kwargs or {}))


def _room_of_tables(model: Any, longest: int) -> int | None:
    """Positions of the smallest table of them, if one is small enough to matter to ``longest`` and its padding."""
    small = 2 * longest + 64
    if not any(isinstance(module, nn.Embedding) and module.num_embeddings <= small for module in model.modules()):
        return None
    falling = plain_tokens(model, (3,), torch.Generator().manual_seed(0)).sort(descending=True).values
    with _Lookups() as lookups:
        _run(model, falling.unsqueeze(0))  # if it fails, what was seen before holds all the same
    return min((rows - first for rows, first in lookups.seen if rows <= small), default=None)


def _runs_with(model: Any, length: int) -> bool:
    """Whether ``length`` tokens run where a few do: positions may also be buffers, or biases of that size.

    On accelerators True, because an index beyond a table ends the process there; the longest batch is run anyway.
    """
    if next(model.parameters()).device.type != "cpu":
        return True
    token = plain_tokens(model, (1, 1), torch.Generator().manual_seed(0))
    return _run(model, token.expand(1, length)) is None or _run(model, token.expand(1, 3)) is not None


@torch.no_grad()
def _run(model: Any, input_ids: torch.Tensor) -> Exception | None:
    """The error of a forward on ``input_ids``, if any; modes and random numbers stay as they are."""
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            model(input_ids=input_ids.to(next(model.parameters()).device), use_cache=False)
    except Exception as error:
        return error
    return None
