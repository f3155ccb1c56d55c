"""What each method learns and what it forgets, at equal steps and at equal minutes.

    python benchmarks/quality.py                        # every cell; hours on 2 cores
    python benchmarks/quality.py --budget-minutes 60    # as many cells as an hour allows; run again to go on
    python benchmarks/quality.py --methods s2ft --budgets steps --steps 20 --json /tmp/smoke.json

The task is examples/pronounce: SmolLM2-135M-Instruct spells words and answers with phonemes. Every
method sees the same words in the same batches, through one training loop. Each learning rate runs
with one seed; the rate with the lowest loss on validation words, which are neither trained on nor
reported, runs with a second one. Reported are the phoneme error rate on 300 held-out words and the
change in loss on general text (forgetting).

One process per cell. Finished cells are in the JSON file and are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TASK = HERE.parent / "examples" / "pronounce"
RESULTS = HERE / "results" / "quality.json"

# Three rates each, around what the method's authors and a short search recommend.
LEARNING_RATES = {
    "s2ft": (1e-3, 2e-3, 4e-3),
    "s2ft-down": (1e-3, 2e-3, 4e-3),
    "peft-lora": (5e-4, 1e-3, 2e-3),
    "full": (5e-5, 1e-4, 3e-4),
}
SEEDS = 2
VALIDATION_WORDS = 300
POOL_WORDS = 60_000  # more than any budget reaches: no method sees a word twice
WARMUP = 0.03


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run. `budget` is "steps" or "minutes", `amount` how many."""

    method: str
    learning_rate: float
    seed: int
    budget: str
    amount: float

    def same(self, result: dict[str, Any]) -> bool:
        return all(result[key] == value for key, value in dataclasses.asdict(self).items())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(LEARNING_RATES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--budgets", default="steps,minutes", help="what is equal (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps per run (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=3.0, help="training minutes per run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="words per step (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=HERE.parent / ".cache" / "smollm2", help="where the model is")
    parser.add_argument("--json", type=Path, default=RESULTS, help="results, and what is done already")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="start no cell after this long")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.methods.split(",")) - set(LEARNING_RATES)
    if unknown:
        parser.error(f"unknown methods {sorted(unknown)}; known: {', '.join(LEARNING_RATES)}")
    return args


# --- all cells ---------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace) -> None:
    started = time.monotonic()
    results = json.loads(args.json.read_text())["cells"] if args.json.is_file() else []
    # plan() is asked again after every cell: the second seed waits for the best rate of the first.
    while todo := [cell for cell in plan(args, results) if not any(cell.same(result) for result in results)]:
        if (time.monotonic() - started) / 60 > args.budget_minutes:
            print(f"stopped after {args.budget_minutes:g} minutes; {len(todo)} or more cells left, run again to go on")
            break
        results.append(run_cell(args, todo[0]))
        save(args.json, results)
    print_table(results)


def plan(args: argparse.Namespace, results: list[dict[str, Any]]) -> list[Cell]:
    """Every cell that can be named by now."""
    cells = []
    for budget in args.budgets.split(","):
        amount = {"steps": args.steps, "minutes": args.minutes}[budget]
        for method in args.methods.split(","):
            first = [Cell(method, rate, 0, budget, amount) for rate in LEARNING_RATES[method]]
            done = [(result["validation_loss"], cell) for cell in first for result in results if cell.same(result)]
            cells += first
            if len(done) == len(first):
                best = min(done, key=lambda pair: pair[0])[1]
                cells += [dataclasses.replace(best, seed=seed) for seed in range(1, SEEDS)]
    return cells


def run_cell(args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    print(f"{cell} ...", flush=True)
    order = dataclasses.asdict(cell) | {"batch": args.batch, "cache": str(args.cache)}
    command = [sys.executable, __file__, "--worker", json.dumps(order)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    print(f"  error rate {result['error_rate']:.1%}, forgetting {result['forgetting']:+.3f}, {result['steps']} steps")
    return result


def save(path: Path, results: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"cells": results}, indent=1) + "\n")
    temporary.replace(path)


def print_table(results: list[dict[str, Any]]) -> None:
    print(
        f"\n{'equal':9}{'method':11}{'rate':>8}{'seed':>5}{'steps':>7}{'minutes':>9}{'PER':>8}{'forgets':>9}{'MiB':>7}"
    )
    for r in sorted(results, key=lambda r: (r["budget"], r["amount"], r["method"], r["learning_rate"], r["seed"])):
        print(
            f"{r['budget']:9}{r['method']:11}{r['learning_rate']:8.0e}{r['seed']:5}{r['steps']:7}"
            f"{r['seconds'] / 60:9.2f}{r['error_rate']:8.1%}{r['forgetting']:+9.3f}{r['peak_bytes'] / 2**20:7,.0f}"
        )


# --- one cell, in its own process ---------------------------------------------------------------------


def worker(order: dict[str, Any]) -> dict[str, Any]:
    sys.path[:0] = [str(HERE), str(TASK)]
    import _measure
    import torch
    from fetch import GGUF, fetch
    from task import error_rate, pronounce, split_words, text_loss

    from inlay.cli.models import load_model
    from inlay.data import Collator, prepare

    cell = Cell(**{field.name: order[field.name] for field in dataclasses.fields(Cell)})
    torch.manual_seed(cell.seed)
    fetch(order["cache"])
    model, tokenizer = load_model(order["cache"], GGUF, "fast")
    words, held_out = split_words(POOL_WORDS + VALIDATION_WORDS, seed=cell.seed)
    train, validation = (
        prepare([word.record() for word in part], tokenizer, chat_template=False)
        for part in (words[VALIDATION_WORDS:], words[:VALIDATION_WORDS])
    )
    text = (TASK / "general.txt").read_text(encoding="utf-8")
    loss_before = text_loss(model, tokenizer, text)
    model.config.use_cache = False  # Trainer does so; a cache nobody reads costs memory
    collator = Collator.for_model(model, tokenizer)
    before = _measure.reset_peak("cpu")
    model, optimizer, autocast = BUILDERS[cell.method](model, cell.learning_rate, cell.seed)
    steps, seconds = train_loop(cell, model, optimizer, autocast, train, collator, order["batch"])
    peak_bytes = _measure.peak("cpu") - before
    found = error_rate(held_out, pronounce(model, tokenizer, held_out))
    return {key: value for key, value in order.items() if key != "cache"} | {
        "steps": steps,
        "seconds": seconds,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "validation_loss": mean_loss(
            model, [collator(validation.samples[i : i + 64]) for i in range(0, len(validation), 64)]
        ),
        "error_rate": found.rate,
        "error_rate_95": [found.low, found.high],
        "words_exact": found.exact,
        "forgetting": text_loss(model, tokenizer, text) - loss_before,
        "peak_bytes": peak_bytes,
        "machine": _measure.provenance(),
    }


def train_loop(
    cell: Cell, model: Any, optimizer: Any, autocast: Callable[[], Any], data: Any, collator: Any, batch: int
) -> tuple[int, float]:
    """Train until the budget is spent; the rate falls linearly with the share of it that is. Steps, seconds."""
    import torch

    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    seconds, steps = 0.0, 0
    for samples in batches(data, batch, cell.seed):
        spent = (steps if cell.budget == "steps" else seconds / 60) / cell.amount
        if spent >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = cell.learning_rate * min((spent + 1e-3) / WARMUP, 1 - spent, 1.0)
        began = time.perf_counter()
        with autocast():
            loss = model(**collator(samples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds, steps = seconds + time.perf_counter() - began, steps + 1
        if not torch.isfinite(loss):
            raise SystemExit(f"{cell}: the loss is {loss.item()} at step {steps}")
    return steps, seconds


def batches(data: Any, size: int, seed: int) -> Iterator[list[Any]]:
    from inlay.data import LengthGroupedSampler

    order = list(LengthGroupedSampler([len(sample["input_ids"]) for sample in data.samples], size, seed))
    yield from ([data[i] for i in order[start : start + size]] for start in range(0, len(order), size))


def mean_loss(model: Any, all_batches: list[Any]) -> float:
    import torch

    model.eval()
    with torch.inference_mode():
        pairs = [(model(**batch).loss.item(), int((batch["labels"][:, 1:] != -100).sum())) for batch in all_batches]
    return sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)


# --- the methods ----------------------------------------------------------------------------------------


def _s2ft(model: Any, rate: float, seed: int, **options: Any) -> tuple[Any, Any, Any]:
    import inlay

    model = inlay.tune(model, inlay.S2FT(seed=seed, **options))
    return model, inlay.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate), contextlib.nullcontext


def build_s2ft(model: Any, rate: float, seed: int) -> tuple[Any, Any, Any]:
    """inlay's default: 3% of the input channels of o_proj and down_proj."""
    return _s2ft(model, rate, seed)


def build_s2ft_down(model: Any, rate: float, seed: int) -> tuple[Any, Any, Any]:
    """The demo's recipe: 10% of the input channels of down_proj."""
    return _s2ft(model, rate, seed, ratio=0.1, target_modules=["down_proj"])


def build_lora(model: Any, rate: float, seed: int) -> tuple[Any, Any, Any]:
    """PEFT LoRA, r=16 on all linears, alpha 32."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0), contextlib.nullcontext


def build_full(model: Any, rate: float, seed: int) -> tuple[Any, Any, Any]:
    """Full fine-tuning as it is done when it has to be good: fp32 weights, bf16 arithmetic.

    In pure bf16 an update below 1/256 of a weight is rounded away.
    """
    import torch

    dtype = model.dtype
    model = model.float().requires_grad_(True)
    mixed = dtype == torch.bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    return model, optimizer, lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed)


BUILDERS = {"s2ft": build_s2ft, "s2ft-down": build_s2ft_down, "peft-lora": build_lora, "full": build_full}


if __name__ == "__main__":
    arguments = parse()
    if arguments.worker:
        print(json.dumps(worker(json.loads(arguments.worker))))
    else:
        run_all(arguments)
