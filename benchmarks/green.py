"""GreenTrainer's planned share of full fine-tuning's step beside the measured one, at every choice.

    python benchmarks/green.py                       # SmolLM2-135M shape, 4 x 256 tokens, rho=0.5
    python benchmarks/green.py --rho 0.7 --epochs 4

Two models train side by side on the same random tokens: one with GreenTrainer, one with every weight. Their steps take
turns, so that whatever else the machine does slows both, and each epoch's share is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _measure import provenance
from _models import SHAPES, build

import inlay
import inlay.schedules.green as schedules


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a name in benchmarks/_models.py, or a folder")
    parser.add_argument("--rho", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3, help="choices to measure")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed of each, per choice")
    parser.add_argument("--threads", type=int, help="of torch; all cores if not given")
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU seconds; for shared machines")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


class Training:
    """A model, its optimizer, and how long a step takes."""

    def __init__(self, args: argparse.Namespace, method: Any) -> None:
        self.model: nn.Module = inlay.tune(build(args.model), method).train()
        self.optimizer = inlay.optim.AdamW(self.model.parameters(), lr=1e-4, rounding="residual")

    def step(self, tokens: torch.Tensor) -> float:
        began = schedules.now()
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return schedules.now() - began


def main() -> None:
    args = parse()
    if args.cpu_time:
        schedules.now = time.process_time
    if args.threads:
        torch.set_num_threads(args.threads)
    green = Training(args, inlay.GreenTrainer(rho=args.rho, every=args.steps + len(schedules.PHASES) + 1))
    full = Training(args, inlay.Full())
    schedule: Any = green.model.inlay_schedules["default"]  # type: ignore[union-attr]
    random = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[args.model]["vocab_size"] if args.model in SHAPES else green.model.config.vocab_size
    rows: list[dict[str, Any]] = []
    times: dict[str, list[float]] = {"chosen": [], "full": []}
    while len(rows) < args.epochs:
        tokens = torch.randint(0, vocabulary, (args.batch, args.seq), generator=random)
        phase = schedule.phase()
        planned = schedule.planned() if phase == "chosen" else None
        tensors = int(schedule.chosen_mask.sum())
        took = green.step(tokens)
        if planned is None:
            times = {"chosen": [], "full": []}
        elif len(times["full"]) <= args.steps:  # the first makes optimizer states
            times["chosen"].append(took)
            times["full"].append(full.step(tokens))
            if len(times["full"]) > args.steps:
                rows.append(row(planned, times, tensors))
                print(f"epoch {len(rows)}: {told(rows[-1])}", flush=True)
    worst = max(abs(each["measured"] / each["planned"] - 1) for each in rows)
    print(f"measured within {worst:.1%} of the plan")
    if args.json:
        options = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({**provenance(), "options": options, "epochs": rows}, indent=2) + "\n")


def row(planned: float, times: dict[str, list[float]], tensors: int) -> dict[str, Any]:
    chosen, full = (statistics.median(times[kind][1:]) for kind in ("chosen", "full"))
    return {"planned": planned, "measured": chosen / full, "chosen_s": chosen, "full_s": full, "tensors": tensors}


def told(each: dict[str, Any]) -> str:
    return (
        f"{each['tensors']} tensors, planned {each['planned']:.1%}, measured {each['measured']:.1%} of a full step "
        f"({each['chosen_s']:.2f} of {each['full_s']:.2f} s)"
    )


if __name__ == "__main__":
    main()
