"""Record formats: what a training file may hold, and how each record is read.

| format            | keys                              | becomes                                      |
|-------------------|-----------------------------------|----------------------------------------------|
| messages          | messages, tools (optional)        | a conversation; assistant turns supervised   |
| prompt/completion | prompt, completion                | two strings, or two lists of messages        |
| alpaca            | instruction, output, input (opt.) | instruction and answer                       |
| text              | text                              | plain text; every token supervised           |

One set of records has one format. A key that belongs to none of them is an error rather than a
column that is silently ignored: in practice it is a misspelt `input` or `completion`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
RecordSource = str | Path | Sequence[Record]


@dataclass(frozen=True)
class Conversation:
    """Turns for a chat template. Assistant turns from index `supervised_from` on are supervised."""

    messages: list[dict[str, Any]]
    supervised_from: int = 0
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Plain:
    """Two strings, joined as they are. An empty prompt means that every token is supervised."""

    prompt: str
    completion: str


Example = Conversation | Plain

# format name -> (required keys, optional keys)
FORMATS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "messages": (frozenset({"messages"}), frozenset({"tools"})),
    "prompt/completion": (frozenset({"prompt", "completion"}), frozenset()),
    "alpaca": (frozenset({"instruction", "output"}), frozenset({"input"})),
    "text": (frozenset({"text"}), frozenset()),
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
    """Records from a list of dicts, a .jsonl file, or a .json file that holds a list."""
    if isinstance(source, (str, Path)):
        return _read_file(Path(source))
    if isinstance(source, (list, tuple)):
        return list(source)
    raise TypeError(
        f"wanted a path or a list of records, got {type(source).__name__}; "
        "pass list(dataset) if it is an iterable of dicts"
    )


def _read_file(path: Path) -> list[Record]:
    if not path.is_file():
        raise FileNotFoundError(f"wanted a .json or .jsonl file of records, got {path}, which does not exist")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return _read_lines(path, text)
    if path.suffix != ".json":
        raise ValueError(f"wanted a .json or .jsonl file, got {path.name}; rename it or convert it to JSONL")
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); a file with one record per line must be called .jsonl"
        ) from error
    if not isinstance(records, list):
        raise ValueError(
            f"wanted {path} to hold a list of records, got a {type(records).__name__}; "
            "write [{...}, {...}] or one record per line in a .jsonl file"
        )
    return records


def _read_lines(path: Path, text: str) -> list[Record]:
    # Not str.splitlines: U+2028 and friends are legal inside a JSON string.
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); write one record per line") from error
    return records


def parse_records(records: Sequence[Record], *, chat: bool) -> tuple[str, list[Example]]:
    """The format's name and one Example per record. `chat`: the tokenizer's chat template is in use."""
    if not records:
        raise ValueError("wanted at least one training record, got none; check the data path or the list passed")
    name = _detect_format(records[0], 0)
    for index, record in enumerate(records):
        found = _detect_format(record, index)
        if found != name:
            raise ValueError(
                f"record {index} is in the {found} format, but record 0 is in the {name} format; "
                "a data set holds one format: split it or convert one of the two"
            )
    return name, [_parse(name, record, index, chat) for index, record in enumerate(records)]


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
        return Conversation(_check_messages(record["messages"], "messages", index), tools=record.get("tools"))
    if name == "prompt/completion":
        return _parse_prompt_completion(record, index, chat)
    if name == "alpaca":
        return _parse_alpaca(record, index, chat)
    return Plain("", _check_text(record, "text", index))


def _parse_prompt_completion(record: Record, index: int, chat: bool) -> Example:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = _check_messages(prompt, "prompt", index)
        return Conversation(turns + _check_messages(completion, "completion", index), supervised_from=len(turns))
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
    return [dict(turn) for turn in messages]
