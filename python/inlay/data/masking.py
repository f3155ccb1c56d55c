"""Which tokens are supervised: from an Example to {input_ids, labels}.

The mask of a conversation is found by rendering prefixes; see :mod:`inlay.data.turns`.

Tokens of the prompt are always the ones that generation will see, because a prompt is tokenized on
its own there: if tokenizing prompt and completion together would merge characters across the
border, the pieces are tokenized apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .contents import Contents
from .formats import Conversation, Example, Plain, Tokenized
from .tokens import Tokens
from .turns import NO_TEMPLATE, Span, Turns

IGNORED = -100  # the label of an unsupervised position, everywhere in this field
#: Raised with every change of what records become: samples on disk are of one encoding.
ENCODING = 2

Sample = dict[str, list[int]]
Piece = tuple[str, bool]  # text, supervised


class Encoder:
    """Encodes examples for one tokenizer.

    `chat_template`: None uses the tokenizer's template if it has one, for every format but text;
    False never uses it (prompt and completion are then joined as they are); True demands one.
    `notes`: what a user should know of the records and the template, each once, in order.

    Raises:
        TypeError: a processor instead of its tokenizer.
        ValueError: no EOS token; no chat template where one is demanded.
    """

    def __init__(self, tokenizer: Any, *, train_on_inputs: bool = False, chat_template: bool | None = None) -> None:
        _check_tokenizer(tokenizer)
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat_template and not has_template:
            raise ValueError(NO_TEMPLATE)
        self.tokenizer = tokenizer
        self.train_on_inputs = train_on_inputs
        self.chat = has_template if chat_template is None else chat_template
        self.notes: dict[str, None] = {}
        self._contents = Contents(tokenizer) if has_template else None
        self._tokens = Tokens(tokenizer)
        self._turns = Turns(tokenizer, self.notes)

    def encode(self, example: Example) -> list[Sample]:
        """Usually one sample; one per assistant turn where the template rewrites earlier turns."""
        if isinstance(example, Plain):
            return [self._encode_plain(example)]
        if isinstance(example, Tokenized):
            labels = example.input_ids if self.train_on_inputs else example.labels
            return [{"input_ids": list(example.input_ids), "labels": list(labels)}]
        self._note_records(example)
        return [self._encode_pieces(pieces) for pieces in self._split(example)]

    # -- plain text -----------------------------------------------------------------------------

    def _encode_plain(self, example: Plain) -> Sample:
        tokens = self._tokens
        prompt = tokens.plain(example.prompt)
        ids = tokens.plain(example.prompt + example.completion)
        if example.prompt:
            ids = prompt + tokens.following(prompt, ids, example.completion)
        if not example.completion.strip():
            self.notes[_EMPTY_ANSWERS] = None
        if ids[len(prompt) :][-1:] != [tokens.eos]:  # the text may end in it
            ids = ids + [tokens.eos]
        # With no prompt, a leading BOS is supervised in name only: nothing predicts position 0.
        hidden = 0 if self.train_on_inputs or not example.prompt else len(prompt)
        return {"input_ids": ids, "labels": [IGNORED] * hidden + ids[hidden:]}

    # -- conversations --------------------------------------------------------------------------

    def _split(self, conversation: Conversation) -> list[list[Piece]]:
        """The rendered conversation cut at the borders of its supervised turns."""
        if self._contents is not None:
            messages = self._contents.as_the_template_wants(conversation.messages)
            conversation = replace(conversation, messages=messages)
        messages = conversation.messages
        full = self._turns.render(conversation, len(messages))
        self._turns.note_what_is_left_out(conversation, full)
        if self.train_on_inputs:
            return [self._all_but_skipped(conversation, full)]
        turns = [
            i
            for i in range(conversation.supervised_from, len(messages))
            if messages[i]["role"] == "assistant" and i not in conversation.skipped
        ]
        if any(not messages[i].get("content") and not messages[i].get("tool_calls") for i in turns):
            self.notes[_EMPTY_ANSWERS] = None
        spans = [self._turns.answer(conversation, i) for i in turns]
        if all(full.startswith(span.text) for span in spans):
            return [_cut(full, spans)]
        # The template rewrites history (for example, drops the reasoning of earlier turns). Each turn
        # becomes a sample of its own, rendered exactly as it is when that turn is generated.
        return [_cut(span.text, [span]) for span in spans]

    def _all_but_skipped(self, conversation: Conversation, full: str) -> list[Piece]:
        spans = [self._turns.said(conversation, i) for i in sorted(conversation.skipped)]
        if not all(full.startswith(span.text) for span in spans):
            raise ValueError(
                "train_on_inputs=True: the chat template rewrites earlier turns, so that those of weight 0 cannot be "
                "told from the rest; leave train_on_inputs out, or split the record"
            )
        return [(text, not skipped) for text, skipped in _cut(full.rstrip(), spans)]

    def _note_records(self, conversation: Conversation) -> None:
        if conversation.asked and not self.train_on_inputs:
            self.notes[
                "turns of other roles than 'assistant' are marked as trained, and are not; train_on_inputs=True "
                "trains every turn that is not of weight 0"
            ] = None
        for turn in conversation.messages:
            content = turn.get("content")
            if isinstance(content, str) and (token := self._tokens.special_in(content)):
                self.notes[
                    f"contents of turns hold text of special tokens, such as {token!r}, which is encoded as such; were "
                    "these records rendered by a chat template already?"
                ] = None

    def _encode_pieces(self, pieces: list[Piece]) -> Sample:
        text = ""
        ids: list[int] = []
        labels: list[int] = []
        for place, (piece, supervised) in enumerate(pieces):
            text += piece
            new = self._tokens.following(ids, self._tokens.of(text), piece)
            ids = ids + new
            labels += new if supervised else [IGNORED] * len(new)
            if supervised and new and new[-1] not in self._tokens.special_ids and place < len(pieces) - 1:
                self.notes[
                    "the chat template has no end-of-turn token: only the last turn of a conversation teaches the "
                    "model to stop"
                ] = None
        if pieces and pieces[-1][1] and ids[-1] not in self._tokens.special_ids:
            # A template without an end-of-turn token: without this the model would never stop.
            ids.append(self._tokens.eos)
            labels.append(self._tokens.eos)
        return {"input_ids": ids, "labels": labels}


_EMPTY_ANSWERS = "records with empty answers teach the model to stop at once"


def _check_tokenizer(tokenizer: Any) -> None:
    if not hasattr(tokenizer, "eos_token_id"):
        inner = " (pass processor.tokenizer)" if hasattr(tokenizer, "tokenizer") else ""
        raise TypeError(f"wanted a tokenizer, got {type(tokenizer).__name__}{inner}")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "wanted a tokenizer with an end-of-sequence token, got eos_token=None: the model would never "
            "learn to stop; set tokenizer.eos_token"
        )


def _cut(full: str, spans: Sequence[Span]) -> list[Piece]:
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
