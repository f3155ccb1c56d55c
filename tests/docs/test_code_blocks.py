"""Every ```python block of the README and the docs runs, in order, one document at a time.

A block finds what a reader has at hand: `path` (or `model_path`), a folder with a model and its tokenizer, and
`train.jsonl` in the current folder (`data_path`). Blocks behind an HTML comment "not run: <reason>" are other
libraries' code.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import families
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "data"))

from toys import CHATML, build_model, build_tokenizer  # noqa: E402

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(<!-- not run: [^>]+-->\n)?```python\n(.*?)```", re.DOTALL)
RECORDS = [{"prompt": f"{word}:", "completion": f" {word[::-1]}"} for word in ("cat", "mat", "hello", "there", "sat")]


def blocks(document: Path) -> list[tuple[int, str]]:
    """(line, code) of the blocks of a document that are to run."""
    text = document.read_text()
    found = [(text.count("\n", 0, m.start(2)) + 1, m.group(2)) for m in _BLOCK.finditer(text) if not m.group(1)]
    return [(line, code) for line, code in found if ">>>" not in code]


def test_the_documents_have_code():
    assert sum(len(blocks(document)) for document in DOCUMENTS) >= 10


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=lambda path: path.name)
def test_code_blocks_run(document, tmp_path, monkeypatch):
    tokenizer = build_tokenizer(CHATML)
    made = families.BY_NAME["mixtral"].build() if document.name == "moe.md" else build_model(len(tokenizer))
    made.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(record) for record in RECORDS * 4))
    monkeypatch.chdir(tmp_path)
    model, data = str(tmp_path / "model"), str(tmp_path / "train.jsonl")
    namespace = {"__name__": "__docs__", "path": model, "model_path": model, "data_path": data}
    for line, code in blocks(document):
        exec(compile("\n" * (line - 1) + code, str(document), "exec"), namespace)
