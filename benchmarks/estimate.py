"""Estimated beside measured peak memory of a training step, method by method.

    python benchmarks/estimate.py                                  # SmolLM2-135M shape, CPU, 4 x 256 tokens
    python benchmarks/estimate.py --device cuda --model llama-8b --batch 4 --seq 2048

Each method is measured in a process of its own, the way benchmarks/train_step.py measures: peak above the loaded model
over three steps. The estimate sees the shapes only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

METHODS = ("inlay-s2ft", "inlay-lora", "inlay-s2ft-nf4", "inlay-qlora")
STEPS = 3
MIB = 2**20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a name in benchmarks/_models.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


def estimated(args: argparse.Namespace, method: str) -> Any:
    """What inlay expects of the method that train_step.py calls so."""
    import torch
    from _models import config_of

    import inlay

    configs = {"s2ft": inlay.S2FT(ratio=0.03), "lora": inlay.LoRA(r=16, lora_alpha=32)}
    nested = inlay.BaseConfig("nf4", double_quant=True)
    dtype = getattr(torch, args.dtype)
    return inlay.estimate(
        config_of(args.model, dtype),
        configs["s2ft" if "s2ft" in method else "lora"],
        base=nested if "nf4" in method or "qlora" in method else None,
        batch=args.batch,
        seq=args.seq,
        dtype=dtype,
        device=args.device.partition(":")[0],
    )


def measured(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Peak and kept bytes of a few steps in a fresh process."""
    from train_step import Process

    process = Process(args, method)
    for _ in range(STEPS):
        process.step(timed=True)
    return process.close(args.batch * args.seq)


def main() -> None:
    args = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import _measure
    from _models import SHAPES

    layers = SHAPES[args.model]["num_hidden_layers"]
    rows = []
    print(
        f"| method | estimated, MiB | low to high | measured, MiB | ratio | kept, estimated / measured |\n{'|---' * 6}|"
    )
    for method in METHODS:
        expected, real = estimated(args, method), measured(args, method)
        peak, kept = real["peak_bytes_above_model"], real["kept_per_token_per_layer"]
        ours = expected.kept_bytes / expected.tokens / layers
        rows.append({"method": method, "measured": {"peak": peak, "kept": kept}, "estimated": expected.to_dict()})
        print(
            f"| {method} | {expected.peak / MIB:,.0f} | {expected.low / MIB:,.0f} to {expected.high / MIB:,.0f} | "
            f"{peak / MIB:,.0f} | {expected.peak / peak:.2f} | {ours / kept:.3f} |",
            flush=True,
        )
    if args.json:
        setting = {key: str(value) for key, value in vars(args).items() if key != "json"}
        result = {"setting": setting, "machine": _measure.provenance(args.device), "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
