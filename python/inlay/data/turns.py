"""Where each turn of a rendered conversation begins and ends, and what the template makes of what turns say.

A turn is the text that the chat template adds between "everything before it, plus the generation prompt" and
"everything up to and including it". This needs no ``{% generation %}`` markers, which most published templates lack.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .formats import Conversation

#: What a generation prompt may hold that a finished turn lacks: white space, or an empty block of reasoning.
_EMPTY = re.compile(r"\s*(<(\w+)>\s*</\2>\s*)?")
_OPEN = re.compile(r"\s*<(\w+)>\s*")
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Span:
    """A turn: text[start:] where text is the conversation rendered up to that turn."""

    text: str
    start: int


class Turns:
    """Renders conversations and finds their turns. ``notes``: what a user should know of the template, each once."""

    def __init__(self, tokenizer: Any, notes: dict[str, None]) -> None:
        self.tokenizer = tokenizer
        self.notes = notes

    def render(self, conversation: Conversation, count: int, *, add_generation_prompt: bool = False) -> str:
        """The first ``count`` turns as text."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(NO_TEMPLATE)
        if count == 0:
            return ""  # templates may index messages[0]
        return self.tokenizer.apply_chat_template(
            conversation.messages[:count],
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def answer(self, conversation: Conversation, index: int) -> Span:
        """The assistant's turn ``index``, from where generation begins.

        Raises:
            ValueError: the turn changes the text before it, or leaves out its tool calls.
        """
        turn = conversation.messages[index]
        text = self.render(conversation, index + 1)
        if not index:
            span = Span(text, self._opening_start(conversation, text))
        else:
            span = self._generated(turn, self.render(conversation, index, add_generation_prompt=True), text)
        if span.start < len(self.render(conversation, index)):
            raise ValueError(
                f"the chat template does not extend a conversation turn by turn (turn {index} changes the text "
                "before it), so the assistant's tokens cannot be told from the rest; "
                "use train_on_inputs=True, or pass prompt/completion records with chat_template=False"
            )
        self._check_calls(turn, index, span.text[span.start :])
        self._note_lost("reasoning", "assistant", _reasoning_of(turn), span.text[span.start :])
        return span

    def said(self, conversation: Conversation, index: int) -> Span:
        """The turn ``index`` of whoever speaks there."""
        if conversation.messages[index]["role"] == "assistant":
            return self.answer(conversation, index)
        return Span(self.render(conversation, index + 1), len(self.render(conversation, index)))

    def _generated(self, turn: Mapping[str, Any], before: str, text: str) -> Span:
        """The turn as it follows ``before``, the conversation that generation goes on from."""
        start = len(os.path.commonprefix([before, text]))
        extra = before[start:]
        if not extra:
            return Span(text, start)
        if _EMPTY.fullmatch(extra):
            return Span(before + text[start:].lstrip(), len(before))
        if _OPEN.fullmatch(extra) and (restored := _with_reasoning(turn, text[start:])) is not None:
            return Span(before + restored, len(before))
        self.notes[
            f"generation begins with {extra.strip()!r}, which the chat template leaves out of finished turns: "
            "what is trained begins before it"
        ] = None
        return Span(text, start)

    def _opening_start(self, conversation: Conversation, text: str) -> int:
        """A conversation that opens with the assistant has no prompt: its words begin where those of others would."""
        first = conversation.messages[0]
        others = []
        for word in ("A", "Z"):  # one of them begins with another letter than the turn
            words = [{"type": "text", "text": word}] if isinstance(first.get("content"), list) else word
            changed = Conversation([{"role": first["role"], "content": words}], tools=conversation.tools)
            others.append(len(os.path.commonprefix([text, self.render(changed, 1)])))
        return min(others)

    # -- what is left out -----------------------------------------------------------------------

    def note_what_is_left_out(self, conversation: Conversation, full: str) -> None:
        """Look for what each turn says, and the names of the tools, in the rendered conversation."""
        for turn in conversation.messages:
            self._note_lost("text", turn["role"], _text_of(turn), full)
        for name in _names(conversation.tools):
            if name not in full:
                self.notes["the chat template leaves out the tools that records offer"] = None

    def _note_lost(self, what: str, role: str, said: str, text: str) -> None:
        if said and not any(form in text for form in _written_forms(said)):
            self.notes[f"the chat template leaves out or changes {what} of turns of role {role!r}"] = None

    def _check_calls(self, turn: Mapping[str, Any], index: int, text: str) -> None:
        for name in _names(turn.get("tool_calls")):
            if name not in text:
                raise ValueError(
                    f"turn {index} calls the tool {name!r}, which the chat template does not write; use the template "
                    "of a model that was trained to call tools, or write the call into the turn's content"
                )


NO_TEMPLATE = (
    "wanted a chat template for records of messages, got a tokenizer without one; set tokenizer.chat_template "
    "(it comes with the model's instruct version), or use prompt/completion records"
)


def _with_reasoning(turn: Mapping[str, Any], written: str) -> str | None:
    """The turn behind a prompt that has opened its reasoning already: reasoning, end of it, answer, end of turn.

    None if the record has no reasoning, or the answer is not in what the template wrote.
    """
    content, answer, reasoning = _content(turn), _text_of(turn), _reasoning_of(turn)
    place = written.rfind(answer) if answer else -1
    if place < 0 or not reasoning:
        return None
    end = written[place + len(answer) :]
    if "</think>" not in content:
        return f"{reasoning}\n</think>\n\n{answer}{end}"
    _, opening, opened = content.partition("<think>")
    return (opened if opening else content).strip() + end  # with the white space that the record has around the tags


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def _text_of(turn: Mapping[str, Any]) -> str:
    """What a turn says, without reasoning, which templates drop from earlier turns as generation does."""
    return _content(turn).rpartition("</think>")[2].strip()


def _reasoning_of(turn: Mapping[str, Any]) -> str:
    held = next((turn[key] for key in _REASONING if isinstance(turn.get(key), str)), "")
    inside = _content(turn).rpartition("</think>")[0].rpartition("<think>")[2]
    return (held or inside).strip()


def _written_forms(said: str) -> Iterator[str]:
    yield said
    yield json.dumps(said, ensure_ascii=False)[1:-1]
    yield json.dumps(said)[1:-1]


def _names(functions: Any) -> Iterator[str]:
    """Names of tools or tool calls, nested under "function" or not."""
    for function in functions or ():
        named = function.get("function", function) if isinstance(function, Mapping) else {}
        if isinstance(named, Mapping) and isinstance(named.get("name"), str):
            yield named["name"]
