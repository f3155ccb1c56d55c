"""One training step: tokens/s, peak memory and bytes kept for backward, method against method.

    python benchmarks/train_step.py                                   # SmolLM2-135M shape, CPU
    python benchmarks/train_step.py --device cuda --model llama-8b --batch 4 --seq 2048

One process per method; on a CPU the processes take turns step by step, so that drift of a shared machine hits all
alike. Quote ratios of medians. The floor is what no method can save: its matrix products and attention, timed alone
in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEFAULT_METHODS = "inlay-s2ft,peft-lora,full,inlay-s2ft-in-place,inlay-lora"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, llama-1b, llama-8b, or a model directory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default=DEFAULT_METHODS, help="comma-separated; ratios refer to the second")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=9, help="timed steps per method")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- one method, in its own process -----------------------------------------------------------------------------------


def worker(args: argparse.Namespace) -> None:
    """Build one method, then answer each line on stdin ("step", "kept", "peak") with one JSON line."""
    import torch

    sys.path.insert(0, str(HERE))
    if args.worker.startswith("unsloth"):
        import unsloth  # noqa: F401  it changes transformers, and wants to come first

    import _measure
    import _models
    from _methods import METHODS, load

    model = load(args.worker, _models.build(args.model, args.device, getattr(torch, args.dtype)))
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.seq), device=args.device)
    before = _measure.reset_peak(args.device)
    built = METHODS[args.worker](model)
    built.model.train()

    def step() -> dict[str, float]:
        times = [now(args.device)]
        loss = built.model(input_ids=tokens, labels=tokens).loss
        times.append(now(args.device))
        loss.backward()
        times.append(now(args.device))
        built.optimizer.step()
        built.optimizer.zero_grad()
        times.append(now(args.device))
        return {**{k: b - a for k, a, b in zip(PARTS, times, times[1:])}, "loss": float(loss.detach())}

    def kept() -> dict[str, float]:
        with _measure.kept_bytes(built.model) as result:
            loss = built.model(input_ids=tokens, labels=tokens).loss
        del loss
        return {"kept_per_token_per_layer": result["bytes"] / tokens.numel() / model.config.num_hidden_layers}

    def peak() -> dict[str, float]:
        trainable = sum(
            p.numel() for p in built.model.parameters() if p.requires_grad
        )  # of which a schedule has chosen
        return {"peak": _measure.peak(args.device) - before, "trainable": trainable}

    answers = {"step": step, "kept": kept, "peak": peak}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


PARTS = ("forward", "backward", "optimizer")


def now(device: str) -> float:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


# --- the comparison ---------------------------------------------------------------------------------------------------


class Process:
    """A worker process and what it measured."""

    def __init__(self, args: argparse.Namespace, method: str) -> None:
        command = [sys.executable, __file__, "--worker", method]
        for option in ("model", "device", "batch", "seq", "dtype"):
            command += [f"--{option}", str(getattr(args, option))]
        self.method, self.steps = method, []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer("ready")

    def _answer(self, key: str) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{") and key in line:
                return json.loads(line)
        raise SystemExit(f"{self.method}: the worker ended without an answer; its error is above")

    def ask(self, what: str, key: str) -> dict[str, Any]:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer(key)

    def step(self, timed: bool) -> None:
        result = self.ask("step", "optimizer")
        if timed:
            self.steps.append(result)

    def close(self, tokens: int) -> dict[str, Any]:
        peak, kept = self.ask("peak", "peak"), self.ask("kept", "kept")
        self.process.stdin.close()
        self.process.wait()
        parts = {part: statistics.median(s[part] for s in self.steps) for part in PARTS}
        total = statistics.median(sum(s[part] for part in PARTS) for s in self.steps)
        return {
            "method": self.method,
            "trainable": peak["trainable"],
            "step_seconds": total,
            "tokens_per_second": tokens / total,
            "peak_bytes_above_model": peak["peak"],
            **kept,
            "parts_seconds": parts,
            "steps_seconds": [sum(s[part] for part in PARTS) for s in self.steps],
        }


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every method; step by step in turn on a CPU, one after the other on a GPU (its memory holds one)."""
    methods = args.methods.split(",")
    groups = [methods] if args.device == "cpu" else [[m] for m in methods]
    rows = []
    for group in groups:
        processes = [Process(args, method) for method in group]
        for index in range(args.warmup + args.steps):
            for process in processes:
                process.step(timed=index >= args.warmup)
        rows += [process.close(args.batch * args.seq) for process in processes]
    return rows


def floor(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the products and the attention of one step with every weight frozen: forward and dX, nothing else."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    sys.path.insert(0, str(HERE))
    from _models import SHAPES

    if args.model not in SHAPES:
        return {}
    shape, dtype, device = SHAPES[args.model], getattr(torch, args.dtype), args.device
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, kv = shape["num_attention_heads"], shape["num_key_value_heads"]
    width = shape.get("head_dim", hidden // heads)
    tokens = args.batch * args.seq
    sizes = [(hidden, heads * width), (hidden, kv * width), (hidden, kv * width), (heads * width, hidden)]
    sizes += [(hidden, inner), (hidden, inner), (inner, hidden)]

    def random(*dims: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(*dims, dtype=dtype, device=device).requires_grad_(grad)

    def timed(run: Any) -> float:
        run()
        times = []
        for _ in range(5):
            start = now(device)
            run()
            times.append(now(device) - start)
        return statistics.median(times)

    def product(k: int, n: int, m: int = tokens) -> float:
        x, w, dy = random(m, k), random(n, k), random(m, n)
        return timed(lambda: (x @ w.t(), dy @ w))

    query = random(args.batch, heads, args.seq, width, grad=True)
    key, value = (random(args.batch, kv, args.seq, width, grad=True) for _ in range(2))
    grad = random(args.batch, heads, args.seq, width)

    def attention() -> None:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != kv)
        torch.autograd.grad(out, (query, key, value), grad)

    result = {"linears": layers * sum(product(k, n) for k, n in sizes), "attention": layers * timed(attention)}
    chunk = min(tokens, 1024)
    result["loss_products"] = product(hidden, shape["vocab_size"], chunk) * tokens / chunk
    return result


def table(rows: list[dict[str, Any]], floors: dict[str, float], tokens: int) -> str:
    """The result as Markdown; ratios are to the second row."""
    other = rows[1] if len(rows) > 1 else rows[0]
    lines = [
        "| method | tokens/s | ratio | peak above model | ratio | kept per token per layer | trainable |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed = row["tokens_per_second"] / other["tokens_per_second"]
        memory = row["peak_bytes_above_model"] / other["peak_bytes_above_model"]
        lines.append(
            f"| {row['method']} | {row['tokens_per_second']:.0f} | {speed:.2f}x | "
            f"{row['peak_bytes_above_model'] / 2**20:.0f} MiB | {memory:.2f}x | "
            f"{row['kept_per_token_per_layer'] / 1000:.1f} KB | {row['trainable'] / 1e6:.2f} M |"
        )
    if floors:
        total = sum(floors.values())
        detail = ", ".join(f"{name.replace('_', ' ')} {seconds:.3f} s" for name, seconds in floors.items())
        lines.append(f"\nfloor {total:.3f} s = {tokens / total:.0f} tokens/s ({detail})")
    return "\n".join(lines)


def main() -> None:
    args = parse()
    if args.worker:
        worker(args)
        return
    sys.path.insert(0, str(HERE))
    import _measure

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows, floors = compare(args), floor(args)
    machine = _measure.provenance(args.device)
    setting = {k: str(v) for k, v in vars(args).items() if k not in ("json", "worker")}
    print(f"\n{args.model}, {args.batch} x {args.seq} tokens, {args.dtype}; {_measure.describe(machine)}\n")
    print(table(rows, floors, args.batch * args.seq))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"setting": setting, "machine": machine, "rows": rows, "floor": floors}
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
