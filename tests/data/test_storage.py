"""Encoded samples on disk: the same samples, and no more of them in memory than are asked for."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from toys import build_tokenizer

from inlay.data import prepare

RECORDS = [{"prompt": f"the cat {i}", "completion": f" sat on mat {i % 7}"} for i in range(50)]


def test_the_same_samples_as_in_memory(tmp_path):
    tokenizer = build_tokenizer()
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    memory = prepare(RECORDS, tokenizer, max_length=24)
    disk = prepare(path, tokenizer, max_length=24, folder=tmp_path / "encoded")
    assert list(disk.samples) == memory.samples and disk.report == memory.report
    assert disk.lengths == memory.lengths and disk.sha256() == memory.sha256()
    assert disk[-1] == memory.samples[-1] and len(disk) == 50
    with pytest.raises(IndexError):
        disk[50]
    assert list(disk.pack(24).samples) == list(memory.pack(24).samples)


def test_the_same_file_is_not_encoded_twice(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    first = prepare(path, build_tokenizer(), folder=tmp_path / "encoded")
    with monkeypatch.context() as patch:
        patch.setattr("inlay.data.dataset.iter_records", None)  # a call would raise
        again = prepare(path, build_tokenizer(), folder=tmp_path / "encoded")
    assert list(again.samples) == list(first.samples) and again.report == first.report
    with pytest.raises(FileExistsError):  # encoded in another way
        prepare(path, build_tokenizer(), folder=tmp_path / "encoded", max_length=12)
    path.write_text("\n".join(json.dumps(record) for record in RECORDS[1:]))
    with pytest.raises(FileExistsError):  # another file by now
        prepare(path, build_tokenizer(), folder=tmp_path / "encoded")


def test_a_folder_in_use_or_cut_short_is_refused(tmp_path):
    prepare(RECORDS, build_tokenizer(), folder=tmp_path / "encoded")
    with pytest.raises(FileExistsError, match=r"wanted an empty folder .* tokens.bin"):
        prepare(RECORDS, build_tokenizer(), folder=tmp_path / "encoded")
    from inlay.data import DiskSamples

    (tmp_path / "encoded" / "labels.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"labels.bin, got 4; encode the data again"):
        DiskSamples(tmp_path / "encoded")


def test_a_large_file_is_not_read_into_memory(tmp_path):
    path = tmp_path / "big.jsonl"
    line = json.dumps({"input_ids": list(range(3000))}) + "\n"
    with path.open("w") as file:
        for _ in range(500):
            file.write(line)
    tracemalloc.start()
    data = prepare(path, build_tokenizer(), max_length=4096, folder=tmp_path / "encoded")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) == 500 and data.report.tokens == 1_500_000
    assert peak < path.stat().st_size / 4
