"""Write the task as JSONL, for `inlay train`: python examples/pronounce/write_data.py FOLDER [WORDS]"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from task import Word, split_words

TRAIN_WORDS = 9600


def write_data(folder: str | Path, train_words: int = TRAIN_WORDS) -> None:
    train, held_out = split_words(train_words)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.jsonl", train)
    _write(folder / "held_out.jsonl", held_out)


def _write(path: Path, words: Iterable[Word]) -> None:
    path.write_text("".join(json.dumps(word.record()) + "\n" for word in words), encoding="utf-8")


if __name__ == "__main__":
    write_data(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else TRAIN_WORDS)
