"""Turns as a chat template wants them: contents as strings or parts, arguments of tools as mappings or JSON.

Some templates expect ``"content": "..."`` and print the Python list where a record has parts; others go through parts
and lose a plain string. Some write the arguments of a tool call with ``tojson`` and escape those that are JSON already,
others join them to a string. What a template does is tried once, on a word of our own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

_WORD = "inlayprobe"
_PARTS = [{"type": "text", "text": _WORD}]
_AS_JSON = '{"' + _WORD + '": 1}'
_AS_MAPPING = {_WORD: 1}


class Contents:
    """Gives turns the form that the template of ``tokenizer`` renders."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._parts: dict[str, bool] = {}  # role: it takes parts alone

    def as_the_template_wants(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The turns with contents and tool calls of one kind.

        Raises:
            ValueError: a part that is not text, contents of another kind, a turn without any.
        """
        return [self._turn(dict(turn), place) for place, turn in enumerate(messages)]

    def _turn(self, turn: dict[str, Any], place: int) -> dict[str, Any]:
        calls = turn.get("tool_calls")
        if turn.get("content") is None and not calls:
            old = "; write function_call as tool_calls" if turn.get("function_call") else ""
            raise ValueError(f"turn {place}: wanted content in a turn of role {turn['role']!r}, got none{old}")
        if turn.get("content") is not None:
            turn["content"] = self._content(turn["content"], turn["role"], place)
        else:
            turn["content"] = None if self._writes_nothing_for_none else ""
        if calls:
            turn["tool_calls"] = [self._call(call) for call in calls]
        return turn

    # -- contents -------------------------------------------------------------------------------

    def _content(self, content: Any, role: str, place: int) -> Any:
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self._takes_parts(role) else content
        if isinstance(content, Mapping) and role == "tool":
            return content if self._takes_mappings else json.dumps(content, ensure_ascii=False)
        if not isinstance(content, list):
            raise ValueError(
                f"turn {place}: wanted a string or a list of text parts as content, got {type(content).__name__}; "
                "write other values as a string, with json.dumps"
            )
        texts = [_text(part, place) for part in content]
        return [{"type": "text", "text": text} for text in texts] if self._takes_parts(role) else "".join(texts)

    def _takes_parts(self, role: str) -> bool:
        if role not in self._parts:
            string, parts = self._render(role, _WORD), self._render(role, _PARTS)
            tells = bool(string or parts) or role == "user"  # else the role is not to be had on its own
            takes = not _written_once(string) and _written_once(parts)
            self._parts[role] = takes if tells else self._takes_parts("user")
        return self._parts[role]

    def _render(self, role: str, content: Any) -> str:
        """What the template makes of a turn, on its own or beside a question: some roles may not stand alone."""
        turn = {"role": role, "content": content}
        questions: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
        ]
        tried = [[turn], *([question, turn] for question in questions), *([turn, question] for question in questions)]
        return next((text for messages in tried if (text := self._try(messages))), "")

    def _try(self, messages: list[dict[str, Any]]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # jinja's errors, and whatever the template's own expressions raise
            return ""
        return text if _WORD in text else ""

    @cached_property
    def _takes_mappings(self) -> bool:
        """A tool's answer that is a mapping is written as JSON."""
        return f'"{_WORD}": true' in self._render("tool", {_WORD: True})

    # -- tool calls -----------------------------------------------------------------------------

    def _call(self, call: Any) -> Any:
        """The call with arguments as the template writes them right; whatever else it holds stays."""
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(call["function"])}
        arguments = call.get("arguments")
        takes_json, takes_mappings = self._takes_arguments
        if isinstance(arguments, str) and takes_mappings and not takes_json:
            parsed = _parsed(arguments)
            return call if parsed is None else {**call, "arguments": parsed}
        if isinstance(arguments, Mapping) and takes_json and not takes_mappings:
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return call

    @cached_property
    def _takes_arguments(self) -> tuple[bool, bool]:
        """Whether arguments come out right as JSON, and as a mapping."""
        forms: tuple[Any, ...] = (_AS_JSON, _AS_MAPPING)
        as_json, as_mapping = (_written_once(self._render_call("", arguments)) for arguments in forms)
        return as_json, as_mapping

    @cached_property
    def _writes_nothing_for_none(self) -> bool:
        """A call without content is written as one with an empty one, not with the word None."""
        forms: tuple[Any, ...] = (_AS_JSON, _AS_MAPPING)
        pairs = ((self._render_call(None, form), self._render_call("", form)) for form in forms)
        return any(none and none == empty for none, empty in pairs)

    def _render_call(self, content: Any, arguments: Any) -> str:
        question = [{"type": "text", "text": "x"}] if self._takes_parts("user") else "x"
        call = {"type": "function", "id": "inlay0000", "function": {"name": "inlaycall", "arguments": arguments}}
        answer = {"role": "assistant", "content": content, "tool_calls": [call]}
        return self._try([{"role": "user", "content": question}, answer])


def _written_once(text: str) -> bool:
    """The word once, and nothing of a Python list or mapping around it, nor an escaped quote."""
    around = ("'text'", '"text"', f"'{_WORD}'", '\\"' + _WORD)
    return text.count(_WORD) == 1 and not any(sign in text for sign in around)


def _text(part: Any, place: int) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
    text = part.get("text") if isinstance(part, Mapping) else part
    if kind != "text" or not isinstance(text, str):
        raise ValueError(
            f"turn {place}: wanted parts of text, got one of type {kind!r}; inlay.data prepares text: images "
            "and sound need the model's processor and a trainer of their own"
        )
    return text


def _parsed(arguments: str) -> dict[str, Any] | None:
    try:
        held = json.loads(arguments)
    except json.JSONDecodeError:
        return None
    return held if isinstance(held, dict) else None
