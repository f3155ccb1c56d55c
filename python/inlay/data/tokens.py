"""Text to tokens: what follows a prompt, tokenized as generation would write it, and BOS and EOS once."""

from __future__ import annotations

import re
from typing import Any

#: Texts to put before another, to see its tokens in the middle of a text. Not special ones: some tokenizers begin
#: anew behind those, with the space that they put before every text.
_ANCHORS = ("\n", ":", "a", "0")


class Tokens:
    """The tokenizer of one :class:`inlay.data.Encoder`, and its habits, each tried once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_id
        self.bos = tokenizer.bos_token_id
        ends = list(tokenizer("a")["input_ids"])
        self._adds_bos = len(ends) > 1 and ends[0] == self.bos
        self._adds_eos = bool(ends) and ends[-1] == self.eos
        # SentencePiece's dummy prefix and GPT-2's add_prefix_space: a space before every text on its own.
        self._adds_space = self.of("\na") != self.of("\n") + self.of("a")
        added = getattr(tokenizer, "added_tokens_decoder", {})
        # all_special_ids holds the named ones only; end-of-turn tokens are often just "added, special".
        self.special_ids = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        texts = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self._special = re.compile("|".join(map(re.escape, sorted(texts - {""}, key=len, reverse=True))) or r"(?!)")

    def of(self, text: str) -> list[int]:
        """Tokens of rendered text, to which the template has added every special token."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def plain(self, text: str) -> list[int]:
        """Tokens of plain text with the tokenizer's BOS, once, and without the EOS it may add."""
        ids = list(self.tokenizer(text)["input_ids"])
        if self._adds_bos and ids[:2] == [self.bos, self.bos]:
            ids = ids[1:]  # the text begins with it, and the tokenizer adds another
        return ids[:-1] if self._adds_eos and ids and ids[-1] == self.eos else ids

    def following(self, ids: list[int], joined: list[int], text: str) -> list[int]:
        """Tokens of ``text`` behind ``ids``, given the tokens of all text up to its end.

        Where the two would merge at their border, the text is tokenized apart, without the space that some tokenizers
        put before a text on its own.
        """
        if joined[: len(ids)] == ids:
            return joined[len(ids) :]
        for anchor in _ANCHORS if self._adds_space else ():
            head, both = self.of(anchor), self.of(anchor + text)
            if both[: len(head)] == head:
                return both[len(head) :]
        return self.of(text)

    def special_in(self, text: str) -> str | None:
        """The first special token that is written in ``text``."""
        found = self._special.search(text)
        return found.group() if found else None
