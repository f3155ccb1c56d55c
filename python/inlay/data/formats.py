"""Record formats: what a training file may hold, and how each record is read.

| format            | keys                              | becomes                                      |
|-------------------|-----------------------------------|----------------------------------------------|
| messages          | messages, tools (optional)        | a conversation; assistant turns supervised   |
| sharegpt          | conversations, tools, system (opt.) | the same, from {"from", "value"} turns     |
| prompt/completion | prompt, completion                | two strings, or two lists of messages        |
| alpaca            | instruction, output, input (opt.) | instruction and answer                       |
| text              | text                              | plain text; every token supervised           |
| tokenized         | input_ids, labels, attention_mask (opt.) | taken as it is                        |

One set of records has one format. A key that belongs to none of them is an error rather than a
column that is silently ignored: in practice it is a misspelt `input` or `completion`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
RecordSource = str | Path | Iterable[Record]


@dataclass(frozen=True)
class Conversation:
    """Turns for a chat template. Assistant turns from index `supervised_from` on are supervised, but for those in
    `skipped`, whose record says `weight: 0` or `train: false`. `asked`: turns of others that it says are trained."""

    messages: list[dict[str, Any]]
    supervised_from: int = 0
    tools: list[Any] | None = None
    skipped: frozenset[int] = frozenset()
    asked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plain:
    """Two strings, joined as they are. An empty prompt means that every token is supervised."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Tokenized:
    """Tokens that somebody else has encoded; a label of -100 is not supervised."""

    input_ids: list[int]
    labels: list[int]


Example = Conversation | Plain | Tokenized

# format name -> (required keys, optional keys)
FORMATS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "messages": (frozenset({"messages"}), frozenset({"tools"})),
    "sharegpt": (frozenset({"conversations"}), frozenset({"tools", "system"})),
    "prompt/completion": (frozenset({"prompt", "completion"}), frozenset()),
    "alpaca": (frozenset({"instruction", "output"}), frozenset({"input"})),
    "text": (frozenset({"text"}), frozenset()),
    "tokenized": (frozenset({"input_ids"}), frozenset({"labels", "attention_mask"})),
}

#: Who speaks, in sharegpt's words, and the role a chat template calls it.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def load_records(source: RecordSource) -> list[Record]:
    """All records of a list or iterable of dicts, or of a .jsonl, .json or .parquet file."""
    return list(iter_records(source))


def iter_records(source: RecordSource) -> Iterator[Record]:
    """Records one at a time; of a .jsonl or .parquet file no more than a few are held in memory."""
    if isinstance(source, str | Path):
        yield from _read_file(Path(source))
    elif isinstance(source, Mapping):
        raise TypeError(_WANTED_SOURCE + type(source).__name__)
    elif _is_of_arrow(source):
        yield from map(without_nulls, _each(source))
    elif isinstance(source, Iterable) or hasattr(source, "__getitem__"):
        yield from _each(source)
    else:
        raise TypeError(_WANTED_SOURCE + type(source).__name__)


_WANTED_SOURCE = "wanted a path, or an iterable of dicts such as a list or a datasets.Dataset, got "


def _each(source: Any) -> Iterator[Record]:
    """Records of an iterable, or of one of torch's data sets, which have a length and places alone."""
    return iter(source) if isinstance(source, Iterable) else (source[index] for index in range(len(source)))


def _is_of_arrow(source: Any) -> bool:
    """A datasets.Dataset, an IterableDataset, something derived from one, or torch's subset or chain of them."""
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(source).__mro__}
    if names & {("datasets", "Dataset"), ("datasets", "IterableDataset")}:
        return True
    held = [source.dataset] if ("torch", "Subset") in names else []
    held += source.datasets if ("torch", "ConcatDataset") in names else []
    return any(map(_is_of_arrow, held))


def without_nulls(value: Any) -> Any:
    """A record from Arrow without the nulls that fill the keys it lacks and other rows have, at every depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(held) for key, held in value.items() if held is not None}
    return [without_nulls(held) for held in value] if isinstance(value, list) else value


def _read_file(path: Path) -> Iterator[Record]:
    if not path.is_file():
        raise FileNotFoundError(f"wanted a .jsonl, .json or .parquet file of records, got {path}, which does not exist")
    readers = {".jsonl": _read_lines, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"wanted a .jsonl, .json or .parquet file, got {path.name}; rename it or convert it to JSONL")
    return readers[path.suffix](path)


def _read_json(path: Path) -> Iterator[Record]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); a file with one record per line must be called .jsonl"
        ) from error
    if not isinstance(records, list):
        raise ValueError(
            f"wanted {path} to hold a list of records, got a {type(records).__name__}; "
            "write [{...}, {...}] or one record per line in a .jsonl file"
        )
    return iter(records)


def _read_lines(path: Path) -> Iterator[Record]:
    # newline="\n": U+2028 and friends, where other modes cut lines, are legal inside a JSON string.
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); write one record per line") from error


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"wanted pyarrow to read {path.name}; pip install pyarrow, or convert it to JSONL") from None
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
        yield from map(without_nulls, batch.to_pylist())


def parse_records(records: Iterable[Record], *, chat: bool) -> tuple[str, list[Example]]:
    """The format's name and one Example per record. `chat`: the tokenizer's chat template is in use."""
    parsed = list(iter_examples(records, chat=chat))
    return parsed[0][0], [example for _, example in parsed]


def iter_examples(records: Iterable[Record], *, chat: bool) -> Iterator[tuple[str, Example]]:
    """(format's name, Example) of each record, as they come."""
    name = None
    for index, record in enumerate(records):
        found = _detect_format(record, index)
        name = name or found
        if found != name:
            raise ValueError(
                f"record {index} is in the {found} format, but record 0 is in the {name} format; "
                "a data set holds one format: split it or convert one of the two"
            )
        yield name, _parse(name, record, index, chat)
    if name is None:
        raise ValueError("wanted at least one training record, got none; check the data path or the list passed")


def _detect_format(record: Any, index: int) -> str:
    if not isinstance(record, Mapping):
        raise TypeError(f"record {index}: wanted a dict, got {type(record).__name__}")
    keys = set(record)
    for name, (required, optional) in FORMATS.items():
        if required <= keys and keys <= required | optional:
            return name
    raise ValueError(f"record {index}: {_explain_keys(keys)}")


def _explain_keys(keys: set[str]) -> str:
    wanted = "; ".join(
        f"{name}: {', '.join(sorted(required))}" + (f" (optional: {', '.join(sorted(optional))})" if optional else "")
        for name, (required, optional) in FORMATS.items()
    )
    known = sorted(set().union(*(required | optional for required, optional in FORMATS.values())))
    hints = []
    for key in sorted(map(str, keys - set(known))):
        close = difflib.get_close_matches(key, known, n=1)
        hints.append(f"did you mean {close[0]!r} instead of {key!r}?" if close else f"remove {key!r}")
    hint = f" ({'; '.join(hints)})" if hints else ""
    return f"wanted the keys of one format ({wanted}), got {', '.join(sorted(map(str, keys))) or 'no keys'}{hint}"


def _parse(name: str, record: Record, index: int, chat: bool) -> Example:
    if name == "messages":
        return _conversation(_check_messages(record["messages"], "messages", index), tools=record.get("tools"))
    if name == "sharegpt":
        return _parse_sharegpt(record, index)
    if name == "tokenized":
        return _parse_tokenized(record, index)
    if name == "prompt/completion":
        return _parse_prompt_completion(record, index, chat)
    if name == "alpaca":
        return _parse_alpaca(record, index, chat)
    return Plain("", _check_text(record, "text", index))


def _parse_prompt_completion(record: Record, index: int, chat: bool) -> Example:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = _check_messages(prompt, "prompt", index)
        return _conversation(turns + _check_messages(completion, "completion", index), supervised_from=len(turns))
    prompt, completion = _check_text(record, "prompt", index), _check_text(record, "completion", index)
    return _dialogue(prompt, completion) if chat else Plain(prompt, completion)


def _parse_alpaca(record: Record, index: int, chat: bool) -> Example:
    fields = {key: _check_text(record, key, index) for key in ("instruction", "output")}
    # Published alpaca files write "no input" both as "" and as null.
    fields["input"] = "" if record.get("input") is None else _check_text(record, "input", index)
    if chat:
        question = f"{fields['instruction']}\n\n{fields['input']}" if fields["input"] else fields["instruction"]
        return _dialogue(question, fields["output"])
    template = ALPACA_WITH_INPUT if fields["input"] else ALPACA_WITHOUT_INPUT
    return Plain(template.format(**fields), fields["output"])


def _parse_sharegpt(record: Record, index: int) -> Conversation:
    system = record.get("system")
    messages = [{"role": "system", "content": system}] if system else []
    turns = record["conversations"]
    for position, turn in enumerate(turns if isinstance(turns, list) else ()):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in SHAREGPT_ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(
                f"record {index}, conversations[{position}]: wanted {{'from': one of {sorted(SHAREGPT_ROLES)}, "
                f"'value': '...'}}, got {turn!r:.80}; write other turns, such as tool calls, in the messages format"
            )
        marks = {key: turn[key] for key in _MARKS + _DETAILS if key in turn}
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": turn["value"], **marks})
    return _conversation(_check_messages(messages, "conversations", index), tools=record.get("tools"))


def _parse_tokenized(record: Record, index: int) -> Tokenized:
    ids = record["input_ids"]
    labels = ids if record.get("labels") is None else record["labels"]
    mask = [1] * len(ids) if record.get("attention_mask") is None else record["attention_mask"]
    lists = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    for key, values in lists.items():
        if len(values) != len(ids) or not all(isinstance(value, int) for value in values):
            raise ValueError(f"record {index}: wanted {len(ids)} whole numbers under {key!r}, got {values!r:.80}")
    for key, values, other in (("input_ids", ids, 0), ("labels", labels, -100)):
        if wrong := [value for value in values if value < 0 and value != other]:
            hint = "; a label of -100 is not trained" if other else ""
            raise ValueError(f"record {index}: wanted token ids of at least 0 under {key!r}, got {wrong[0]}{hint}")
    kept = [i for i, seen in enumerate(mask) if seen]  # what a mask hides is padding
    return Tokenized([ids[i] for i in kept], [labels[i] for i in kept])


#: What a turn may say of its own training: OpenAI's key, and axolotl's two.
_MARKS = ("weight", "train", "training")
#: axolotl's training of parts of a turn.
_DETAILS = ("train_detail", "training_detail")


def _conversation(messages: list[dict[str, Any]], **options: Any) -> Conversation:
    """The turns without their marks, which a template would not know, and which of them are skipped."""
    skipped = frozenset(i for i, turn in enumerate(messages) if any(turn.get(mark) in (0, False) for mark in _MARKS))
    asked = frozenset(
        i
        for i, turn in enumerate(messages)
        if turn["role"] != "assistant" and i not in skipped and any(turn.get(mark) in (1, True) for mark in _MARKS)
    )
    bare = [{key: value for key, value in turn.items() if key not in _MARKS + _DETAILS} for turn in messages]
    return Conversation(bare, skipped=skipped, asked=asked, **options)


def _dialogue(question: str, answer: str) -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _check_text(record: Record, key: str, index: int) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise TypeError(f"record {index}: wanted a string under {key!r}, got {type(value).__name__}")
    return value


def _check_messages(messages: Any, key: str, index: int) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"record {index}: wanted a non-empty list of turns under {key!r}, got {messages!r:.80}")
    for position, turn in enumerate(messages):
        complete = isinstance(turn, Mapping) and isinstance(turn.get("role"), str)
        # A turn that only calls tools has no content.
        if not complete or not ("content" in turn or "tool_calls" in turn):
            raise ValueError(
                f"record {index}, {key}[{position}]: wanted a turn like {{'role': 'user', 'content': '...'}}, "
                f"got {turn!r:.80}"
            )
        for detail in _DETAILS:
            if turn.get(detail):
                raise ValueError(
                    f"record {index}, {key}[{position}]: {detail} trains parts of a turn, which is not supported; give "
                    "whole turns a weight of 0 or 1, or pass input_ids and labels"
                )
        for mark in _MARKS:
            if turn.get(mark) not in (None, 0, 1):
                raise ValueError(
                    f"record {index}, {key}[{position}]: wanted {mark} 0 or 1, got {turn[mark]!r}; a turn is trained "
                    "or it is not"
                )
    return [dict(turn) for turn in messages]
