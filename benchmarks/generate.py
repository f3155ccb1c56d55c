"""Decoding speed: greedy tokens/s at batch 1 and 8 on an NF4 base with an adapter active, against bitsandbytes.

    python benchmarks/generate.py [--json benchmarks/results/generate_cpu.json]

SmolLM2-135M's shape with random weights, a 32-token prompt, transformers' own ``generate`` with its cache. The two
models take turns; quote the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _measure
import _models
from _methods import METHODS, load

PROMPT = 32
CASES = ("inlay-qlora", "inlay-s2ft-nf4", "peft-qlora")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default=",".join(CASES))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens per run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def decode(model: nn.Module, batch: int, tokens: int, device: str) -> Callable[[], float]:
    """Seconds of one greedy continuation; the prompt's own forward counts too."""
    torch.manual_seed(batch)
    prompt = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=device)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    options = {**length, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def run() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(**inputs, **options)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def main() -> None:
    args = parse()
    names, models = args.methods.split(","), {}
    for name in names:
        models[name] = METHODS[name](load(name, _models.build(args.model, args.device))).model.eval()
    rows = []
    for batch in (int(b) for b in args.batches.split(",")):
        runs = {name: decode(model, batch, args.tokens, args.device) for name, model in models.items()}
        for run in runs.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(args.runs):
            for name, run in runs.items():
                times[name].append(run())
        peer = statistics.median(times[names[-1]])
        for name in names:
            seconds = statistics.median(times[name])
            speed = batch * args.tokens / seconds
            rows.append({"method": name, "batch": batch, "tokens_per_second": speed, "ratio": peer / seconds})
            print(f"batch {batch}  {name:16s} {speed:8.1f} tokens/s   {peer / seconds:.2f}x {names[-1]}")
    machine = _measure.provenance(args.device)
    print(_measure.describe(machine))
    if args.json:
        setting = {key: str(value) for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"setting": setting, "machine": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
