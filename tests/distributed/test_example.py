"""examples/ddp.py as a user runs it, in two processes and in one."""

import json
import re
from pathlib import Path

import pytest
import torch
from comparing import assert_series
from launch import torchrun
from toys import build_model, build_tokenizer

import inlay

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp.py"
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    build_model().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    words = ["cat", "mat", "hello", "there"]
    records = [{"prompt": f"{word}:", "completion": f" {word[::-1]}"} for word in words]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def losses(workplace, processes, output):
    options = ["--model", workplace / "model", "--data", workplace / "data.jsonl", "--output", workplace / output]
    batch = str(4 // processes)  # every step sees the four records, whatever their order
    printed = torchrun(EXAMPLE, *map(str, options), "--steps", "5", "--batch", batch, processes=processes)
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]


def test_two_processes_train_as_one(workplace):
    two, one = losses(workplace, 2, "two"), losses(workplace, 1, "one")
    assert len(two) == 5 and two[-1] < two[0]
    assert_series(two, one, rtol=1e-4)
    loaded = [inlay.load(build_model(), workplace / output).eval() for output in ("two", "one")]
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded[0](ids).logits, loaded[1](ids).logits, atol=1e-4, rtol=1e-4)
