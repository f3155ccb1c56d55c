"""One training step: tokens/s, peak memory and bytes kept for backward, method against method.

    python benchmarks/train_step.py                                   # SmolLM2-135M shape, CPU
    python benchmarks/train_step.py --device cuda --model llama-8b --batch 4 --seq 2048

One process per method; on a CPU the processes take turns step by step, so that drift of a shared machine hits all
alike. Quote ratios of medians. The floor is what no method can save: its matrix products, timed alone in the same run,
and attention's at their rate.

    python benchmarks/train_step.py --batch 32 --lengths demo         # samples as long as those of `make demo`
    python benchmarks/train_step.py --isa avx2                        # all methods held to one instruction set

With --lengths every method gets the same samples, step by step: peers a padded batch with its mask and labels,
as Trainer gives it to them, inlay's methods what inlay.finetune would give them. Tokens are real ones for all. --isa
sets INLAY_ISA, ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and MKL_ENABLE_INSTRUCTIONS in every process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: What holds inlay, oneDNN, torch's own kernels and MKL to an instruction set. MKL knows bf16 as E3, VNNI as E2.
ISAS = {
    "avx2": ("avx2", "AVX2", "avx2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "avx512", "AVX512_E2"),
    "avx512_bf16": ("avx512_bf16", "AVX512_CORE_BF16", "avx512", "AVX512_E3"),
}
ISA_VARIABLES = ("INLAY_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
DEFAULT_METHODS = "inlay-s2ft,peft-lora,full,inlay-s2ft-in-place,inlay-lora"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, llama-1b, llama-8b, or a model directory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default=DEFAULT_METHODS, help="comma-separated; ratios refer to the second")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--lengths", default="", choices=["", "demo"], help="recorded lengths, instead of --seq")
    parser.add_argument("--isa", default="", choices=["", *ISAS], help="hold every method to this instruction set")
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

    import _lengths
    import _measure
    import _models
    from _methods import METHODS, load

    model = load(args.worker, _models.build(args.model, args.device, getattr(torch, args.dtype)))
    batches = _batches(args, model.config.vocab_size)
    before = _measure.reset_peak(args.device)
    built = METHODS[args.worker](model)
    built.model.train()

    now = _measure.now

    def step() -> dict[str, float]:
        given = next(batches)
        times = [now(args.device)]
        loss = built.model(**given).loss
        times.append(now(args.device))
        loss.backward()
        times.append(now(args.device))
        built.optimizer.step()
        built.optimizer.zero_grad()
        times.append(now(args.device))
        parts = {k: b - a for k, a, b in zip(PARTS, times, times[1:])}
        return {**parts, "loss": float(loss.detach()), "tokens": _lengths.real_tokens(given)}

    def kept() -> dict[str, float]:
        given = next(batches)
        with _measure.kept_bytes(built.model) as result:
            loss = built.model(**given).loss
        del loss
        per_token = result["bytes"] / _lengths.real_tokens(given)
        return {"kept_per_token_per_layer": per_token / model.config.num_hidden_layers}

    def peak() -> dict[str, float]:
        trainable = sum(
            p.numel() for p in built.model.parameters() if p.requires_grad
        )  # of which a schedule has chosen
        return {"peak": _measure.peak(args.device) - before, "trainable": trainable}

    answers = {"step": step, "kept": kept, "peak": peak}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def _lengths_of(args: argparse.Namespace, vocabulary: int) -> list[list[dict[str, Any]]]:
    """The batches of a run with ``--lengths``: the same for every method."""
    import _lengths

    return _lengths.draw(args.lengths, args.batch, args.warmup + args.steps + 1, vocabulary)


def _batches(args: argparse.Namespace, vocabulary: int) -> Iterator[dict[str, Any]]:
    """Arguments of the model's forward, step by step."""
    import _lengths
    import torch

    if not args.lengths:
        tokens = torch.randint(0, vocabulary, (args.batch, args.seq), device=args.device)
        while True:
            yield {"input_ids": tokens, "labels": tokens}
    collate = _lengths.as_finetune if args.worker.startswith("inlay-") else _lengths.padded
    for samples in _lengths_of(args, vocabulary):
        yield {name: value.to(args.device) for name, value in collate(samples).items()}


PARTS = ("forward", "backward", "optimizer")


# --- the comparison ---------------------------------------------------------------------------------------------------


class Process:
    """A worker process and what it measured."""

    def __init__(self, args: argparse.Namespace, method: str) -> None:
        command = [sys.executable, __file__, "--worker", method]
        for option in ("model", "device", "batch", "seq", "dtype", "lengths", "steps", "warmup"):
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

    def close(self) -> dict[str, Any]:
        peak, kept = self.ask("peak", "peak"), self.ask("kept", "kept")
        self.process.stdin.close()
        self.process.wait()
        parts = {part: statistics.median(s[part] for s in self.steps) for part in PARTS}
        total = statistics.median(sum(s[part] for part in PARTS) for s in self.steps)
        return {
            "method": self.method,
            "trainable": peak["trainable"],
            "step_seconds": total,
            "tokens_per_second": statistics.median(s["tokens"] / sum(s[part] for part in PARTS) for s in self.steps),
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
        rows += [process.close() for process in processes]
    return rows


def floor(args: argparse.Namespace) -> dict[str, Any]:
    """``floor``: seconds of the products of a step with every weight frozen; its tokens, the rate of the linears."""
    import torch
    from _floor import floor as measured
    from _models import SHAPES

    if args.model not in SHAPES:
        return {"floor": {}}
    import _lengths

    shape = SHAPES[args.model]
    lengths, supervised = [args.seq] * args.batch, args.batch * args.seq
    if args.lengths:  # the batch in the middle of those by tokens, as a median step is
        batches = _lengths_of(args, shape["vocab_size"])
        samples = sorted(batches, key=lambda batch: sum(len(s["input_ids"]) for s in batch))[len(batches) // 2]
        lengths = [len(sample["input_ids"]) for sample in samples]
        supervised = sum(label != _lengths.IGNORED for sample in samples for label in sample["labels"])
    seconds, rate = measured(shape, lengths, supervised, getattr(torch, args.dtype), args.device)
    return {"floor": seconds, "floor_tokens": sum(lengths), "products_per_second": rate}


def table(rows: list[dict[str, Any]], bound: dict[str, Any]) -> str:
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
    if bound["floor"]:
        total, tokens, rate = sum(bound["floor"].values()), bound["floor_tokens"], bound["products_per_second"]
        detail = ", ".join(f"{name.replace('_', ' ')} {seconds:.3f} s" for name, seconds in bound["floor"].items())
        lines.append(f"\nfloor {total:.3f} s = {tokens / total:.0f} tokens/s ({detail}) at {rate / 1e9:.0f} GFLOP/s")
    return "\n".join(lines)


def main() -> None:
    args = parse()
    if args.worker:
        worker(args)
        return
    if args.isa:  # before torch is imported, here and in the workers
        os.environ.update(zip(ISA_VARIABLES, ISAS[args.isa], strict=True))
    sys.path.insert(0, str(HERE))
    import _measure

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows, bound = compare(args), floor(args)
    machine = _measure.provenance(args.device)
    setting = {k: str(v) for k, v in vars(args).items() if k not in ("json", "worker")}
    shape = (
        f"{args.batch} samples of the lengths of {args.lengths}"
        if args.lengths
        else f"{args.batch} x {args.seq} tokens"
    )
    held = f", held to {args.isa}" if args.isa else ""
    print(f"\n{args.model}, {shape}, {args.dtype}{held}; {_measure.describe(machine)}\n")
    print(table(rows, bound))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"setting": setting, "machine": machine, "rows": rows, **bound}
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
