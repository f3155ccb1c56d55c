"""Memory and traffic per GPU for 8B and 70B models on 1 to 64 GPUs, estimated from their shapes: docs/scale.md.

    python benchmarks/scale.py --json benchmarks/results/scale.json

Nothing is loaded and no GPU is used: `inlay.estimate` counts one step on tensors without data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

GPUS = (1, 2, 4, 8, 16, 32, 64)
ENGINES = ("ddp", "fsdp2")
GB = 1e9


def runs() -> dict[str, tuple[Any, Any]]:
    """Method and base by name."""
    import inlay

    return {
        "S2FT, bf16 base": (inlay.S2FT(ratio=0.03), None),
        "QLoRA, nf4 base": (inlay.LoRA(r=16, lora_alpha=32), inlay.BaseConfig("nf4", double_quant=True)),
    }


def measure(model: str, batch: int, seq: int, checkpointing: bool) -> list[dict[str, Any]]:
    """One row per method, engine and number of GPUs; bytes."""
    from _models import config_of

    import inlay
    from inlay.estimate import per_gpu

    rows = []
    for name, (method, base) in runs().items():
        found = inlay.estimate(
            config_of(model),
            method,
            base=base,
            batch=batch,
            seq=seq,
            device="cuda",
            gradient_checkpointing=checkpointing,
        )
        for engine in ENGINES:
            for gpus in GPUS:
                each = per_gpu(found, gpus, engine)
                rows.append({"model": model, "method": name, **vars(each), "memory": each.memory})
        rows[-1]["flops"] = found.step_flops
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: GB per GPU, and GB sent per step, by number of GPUs."""
    lines = [f"| model | method | engine | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in GPUS)} |"]
    lines.append("|---" * (3 + len(GPUS)) + "|")
    keys = list(dict.fromkeys((row["model"], row["method"], row["engine"]) for row in rows))
    for key in keys:
        held = [row for row in rows if (row["model"], row["method"], row["engine"]) == key]
        cells = [f"{row['memory'] / GB:.1f} ({row['sent'] / GB:.2f})" for row in held]
        lines.append(f"| {' | '.join(key)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-8b,llama-70b", help="names in benchmarks/_models.py")
    parser.add_argument("--batch", type=int, default=1, help="sequences per GPU")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    setting = {"batch": args.batch, "seq": args.seq, "gradient_checkpointing": not args.no_checkpointing}
    rows = []
    for model in args.models.split(","):
        rows += measure(model, args.batch, args.seq, not args.no_checkpointing)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
