"""Estimated beside measured peak memory of whole fine-tuning runs: batches of many widths, evaluations between them.

    python benchmarks/run_memory.py                                 # SmolLM2-135M shape, five shapes of data
    python benchmarks/run_memory.py --model small --shapes short,long

`inlay.finetune` prints both figures of every run; this runs it on random tokens of five kinds, each in a process of its
own, and tells how far apart they are. See benchmarks/estimate.py for single steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

MIB = 2**20
#: By name: dtype, samples' lengths drawn with a generator, and options of `inlay.finetune`.
SHAPES: dict[str, tuple[str, Callable[[random.Random], list[int]], dict[str, Any]]] = {
    "short": (
        "bfloat16",
        lambda draw: [draw.randrange(10, 34) for _ in range(256)],
        {"per_device_train_batch_size": 32, "train_sampling_strategy": "group_by_length"},
    ),
    "fp32": ("float32", lambda draw: [draw.randrange(40, 104) for _ in range(40)], {"per_device_train_batch_size": 8}),
    "tail": (
        "bfloat16",
        lambda draw: [int(16 * 2 ** (5 * draw.random())) for _ in range(32)],
        {"per_device_train_batch_size": 4},
    ),
    "packed": (
        "bfloat16",
        lambda draw: [draw.randrange(20, 120) for _ in range(60)],
        {"per_device_train_batch_size": 4, "packing": True, "max_length": 256},
    ),
    "long": (
        "bfloat16",
        lambda draw: [draw.randrange(512, 1025) for _ in range(8)],
        {"per_device_train_batch_size": 1},
    ),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a name in benchmarks/_models.py")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--method", default="s2ft", choices=["s2ft", "lora"])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a shape to run in this process
    return parser.parse_args()


def run(model_name: str, method: str, shape: str) -> dict[str, Any]:
    """One run; what `finetune` expected and measured, in bytes above the tuned model."""
    import torch
    from _models import build

    import inlay

    dtype, lengths, options = SHAPES[shape]
    model = build(model_name, dtype=getattr(torch, dtype))
    inlay.tune(model, inlay.S2FT(ratio=0.03) if method == "s2ft" else inlay.LoRA(r=16))
    draw, vocabulary = random.Random(0), model.config.vocab_size

    def records(of: list[int]) -> list[dict[str, list[int]]]:
        return [{"input_ids": [draw.randrange(3, vocabulary) for _ in range(count)]} for count in of]

    train, held_out = records(lengths(draw)), records([draw.randrange(10, 200) for _ in range(12)])
    given = {"max_length": 1024, "eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 4}
    result = inlay.finetune(
        model, numbers(vocabulary), train, eval_data=held_out, disable_tqdm=True, **(given | options)
    )
    return {
        "shape": shape,
        "expected": result.expected_memory_bytes,
        "measured": result.peak_memory_bytes,
        "steps": result.steps,
    }


def numbers(count: int) -> Any:
    """A tokenizer whose tokens are numbers: the data is tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(token): token for token in range(3, count)}}
    held = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=held, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def main() -> None:
    args = parse()
    if args.one:
        print("RESULT " + json.dumps(run(args.model, args.method, args.one)), flush=True)
        return
    rows = []
    print("| data | estimated, MiB | measured, MiB | ratio |\n|---|---|---|---|")
    for shape in args.shapes.split(","):
        command = [sys.executable, __file__, "--model", args.model, "--method", args.method, "--one", shape]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(f"{shape}: the run failed\n{done.stderr[-2000:]}")
        row = json.loads(lines[-1].removeprefix("RESULT "))
        rows.append(row)
        expected, measured = row["expected"], row["measured"]
        print(f"| {shape} | {expected / MIB:,.0f} | {measured / MIB:,.0f} | {expected / measured:.2f} |", flush=True)
    if args.json:
        import _measure

        setting = {key: str(value) for key, value in vars(args).items() if key not in ("json", "one")}
        args.json.write_text(
            json.dumps({"setting": setting, "machine": _measure.provenance("cpu"), "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
