"""Contents of turns as a chat template wants them: plain strings, or lists of parts.

Some templates expect ``"content": "..."`` and print the Python list where a record has parts; others go through parts
and lose a plain string. Which of the two a template is, is tried once, on a word of our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_WORD = "inlayprobe"


class Contents:
    """Turns contents into the form that the template of ``tokenizer`` renders."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        takes_strings = self._renders(_WORD) == _WORD
        self.takes_parts = not takes_strings and self._renders([{"type": "text", "text": _WORD}]) == _WORD

    def _renders(self, content: Any) -> str:
        """The word alone if the template writes it, and nothing of a list around it; else "" or what it wrote."""
        try:
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:
            return ""
        return _WORD if text.count(_WORD) == 1 and "'text'" not in text and '"text"' not in text else text

    def as_the_template_wants(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The turns with contents of one kind.

        Raises:
            ValueError: a part that is not text.
        """
        return [
            {**turn, "content": self._content(turn["content"], place)}
            if turn.get("content") is not None
            else dict(turn)
            for place, turn in enumerate(messages)
        ]

    def _content(self, content: Any, place: int) -> Any:
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self.takes_parts else content
        if not isinstance(content, list):
            return content
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            text = part.get("text") if isinstance(part, Mapping) else part
            if kind != "text" or not isinstance(text, str):
                raise ValueError(
                    f"turn {place}: wanted parts of text, got one of type {kind!r}; inlay.data prepares text: images "
                    "and sound need the model's processor and a trainer of their own"
                )
        texts = [part if isinstance(part, str) else part["text"] for part in content]
        return [{"type": "text", "text": text} for text in texts] if self.takes_parts else "".join(texts)
