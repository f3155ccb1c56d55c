"""Which tokens are supervised: from an Example to {input_ids, labels}.

The mask of a conversation is found by rendering prefixes: an assistant turn is the text that the
chat template adds between "everything before it, plus the generation prompt" and "everything up
to and including it". This needs no `{% generation %}` markers, which most published templates lack.

Tokens of the prompt are always the ones that generation will see, because a prompt is tokenized on
its own there: if tokenizing prompt and completion together would merge characters across the
border, the pieces are tokenized apart.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .contents import Contents
from .formats import Conversation, Example, Plain, Tokenized

IGNORED = -100  # the label of an unsupervised position, everywhere in this field

Sample = dict[str, list[int]]
Piece = tuple[str, bool]  # text, supervised


class Encoder:
    """Encodes examples for one tokenizer.

    `chat_template`: None uses the tokenizer's template if it has one, for every format but text;
    False never uses it (prompt and completion are then joined as they are); True demands one.
    """

    def __init__(self, tokenizer: Any, *, train_on_inputs: bool = False, chat_template: bool | None = None) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat_template and not has_template:
            raise ValueError(_NO_TEMPLATE)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "wanted a tokenizer with an end-of-sequence token, got eos_token=None: the model would never "
                "learn to stop; set tokenizer.eos_token"
            )
        self.tokenizer = tokenizer
        self.train_on_inputs = train_on_inputs
        self.chat = has_template if chat_template is None else chat_template
        self._has_template = has_template
        added = getattr(tokenizer, "added_tokens_decoder", {})
        # all_special_ids holds the named ones only; end-of-turn tokens are often just "added, special".
        self.notes: dict[str, None] = {}  # what a user should know of the template, each once
        self._contents = Contents(tokenizer) if has_template else None
        ends = list(tokenizer("a")["input_ids"])
        self._adds_eos = bool(ends) and ends[-1] == tokenizer.eos_token_id
        self._special_ids = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    def encode(self, example: Example) -> list[Sample]:
        """Usually one sample; one per assistant turn where the template rewrites earlier turns."""
        if isinstance(example, Plain):
            return [self._encode_plain(example)]
        if isinstance(example, Tokenized):
            labels = example.input_ids if self.train_on_inputs else example.labels
            return [{"input_ids": list(example.input_ids), "labels": list(labels)}]
        return [self._encode_pieces(pieces) for pieces in self._split(example)]

    # -- plain text -----------------------------------------------------------------------------

    def _encode_plain(self, example: Plain) -> Sample:
        eos = self.tokenizer.eos_token_id
        prompt = self._plain_ids(example.prompt)
        ids = self._plain_ids(example.prompt + example.completion)
        if example.prompt and ids[: len(prompt)] != prompt:
            ids = prompt + self.tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        if ids[len(prompt) :][-1:] != [eos]:  # the text may end in it
            ids = ids + [eos]
        # With no prompt, a leading BOS is supervised in name only: nothing predicts position 0.
        hidden = 0 if self.train_on_inputs or not example.prompt else len(prompt)
        return {"input_ids": ids, "labels": [IGNORED] * hidden + ids[hidden:]}

    def _plain_ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]  # the text begins with it, and the tokenizer adds another
        # Some tokenizers append EOS themselves; we add it once, after the completion.
        return ids[:-1] if self._adds_eos and ids and ids[-1] == self.tokenizer.eos_token_id else ids

    # -- conversations --------------------------------------------------------------------------

    def _split(self, conversation: Conversation) -> list[list[Piece]]:
        """The rendered conversation cut at the borders of its supervised turns."""
        if self._contents is not None:
            messages = self._contents.as_the_template_wants(conversation.messages)
            conversation = replace(conversation, messages=messages)
        messages = conversation.messages
        full = self._render(conversation, len(messages))
        if self.train_on_inputs:
            return [[(full.rstrip(), True)]]
        turns = [
            i
            for i in range(conversation.supervised_from, len(messages))
            if messages[i]["role"] == "assistant" and i not in conversation.skipped
        ]
        spans = [self._turn_span(conversation, i) for i in turns]
        if all(full.startswith(span.text) for span in spans):
            return [_cut(full, spans)]
        # The template rewrites history (for example, drops the reasoning of earlier turns). Each turn
        # becomes a sample of its own, rendered exactly as it is when that turn is generated.
        return [_cut(span.text, [span]) for span in spans]

    def _turn_span(self, conversation: Conversation, index: int) -> _Span:
        before = self._render(conversation, index, add_generation_prompt=True)
        text = self._render(conversation, index + 1)
        # Some templates put more into the generation prompt than into the finished turn (an empty
        # reasoning block); what follows the common part is the turn.
        start = len(os.path.commonprefix([before, text])) if index else _opening_start(conversation, text)
        if index and (extra := before[start:]).strip():
            if not re.fullmatch(r"\s*<(\w+)>\s*</\1>\s*", extra):
                self.notes[
                    f"generation begins with {extra.strip()!r}, which the chat template leaves out of finished turns: "
                    "what is trained begins before it"
                ] = None
            else:  # an empty block: what is trained begins behind it, as generation does
                text, start = before + text[start:].lstrip(), len(before)
        if start < len(self._render(conversation, index)):
            raise ValueError(
                f"the chat template does not extend a conversation turn by turn (turn {index} changes the text "
                "before it), so the assistant's tokens cannot be told from the rest; "
                "use train_on_inputs=True, or pass prompt/completion records with chat_template=False"
            )
        return _Span(text, start)

    def _render(self, conversation: Conversation, count: int, *, add_generation_prompt: bool = False) -> str:
        if not self._has_template:
            raise ValueError(_NO_TEMPLATE)
        if count == 0:
            return ""  # templates may index messages[0]
        return self.tokenizer.apply_chat_template(
            conversation.messages[:count],
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def _encode_pieces(self, pieces: list[Piece]) -> Sample:
        text = ""
        ids: list[int] = []
        labels: list[int] = []
        for piece, supervised in pieces:
            text += piece
            joined = self._template_ids(text)
            new = joined[len(ids) :] if joined[: len(ids)] == ids else self._template_ids(piece)
            ids = ids + new
            labels += new if supervised else [IGNORED] * len(new)
            if supervised and new and new[-1] not in self._special_ids and piece is not pieces[-1][0]:
                self.notes[
                    "the chat template has no end-of-turn token: only the last turn of a conversation teaches the "
                    "model to stop"
                ] = None
        if pieces and pieces[-1][1] and ids[-1] not in self._special_ids:
            # A template without an end-of-turn token: without this the model would never stop.
            ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
        return {"input_ids": ids, "labels": labels}

    def _template_ids(self, text: str) -> list[int]:
        # The template has already written BOS and every other special token.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


_NO_TEMPLATE = (
    "wanted a chat template for records of messages, got a tokenizer without one; set tokenizer.chat_template "
    "(it comes with the model's instruct version), or use prompt/completion records"
)


@dataclass(frozen=True)
class _Span:
    """An assistant turn: text[start:] where text is the conversation rendered up to that turn."""

    text: str
    start: int


def _cut(full: str, spans: Sequence[_Span]) -> list[Piece]:
    pieces: list[Piece] = []
    position = 0
    for span in spans:
        # White space behind the end-of-turn token is the template's, and is never generated.
        end = len(span.text.rstrip())
        pieces += [(full[position : span.start], False), (full[span.start : end], True)]
        position = end
    if full[position:].strip():
        pieces.append((full[position:], False))
    return [(text, supervised) for text, supervised in pieces if text]


def _opening_start(conversation: Conversation, text: str) -> int:
    """A conversation that opens with the assistant has no prefix to render: look for its words."""
    content = conversation.messages[0].get("content")
    return max(text.find(content.strip()), 0) if isinstance(content, str) else 0


def show_mask(tokenizer: Any, sample: Sample, *, limit: int = 1200) -> str:
    """The sample as text, its supervised parts between [[ and ]]."""
    parts: list[str] = []
    run: list[int] = []
    open_run = False
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        if (label != IGNORED) != open_run:
            parts.append(tokenizer.decode(run) + (" ]]" if open_run else "[[ "))
            run, open_run = [], not open_run
        run.append(token)
    parts.append(tokenizer.decode(run) + (" ]]" if open_run else ""))
    text = "".join(parts)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
