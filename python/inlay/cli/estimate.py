"""`inlay estimate MODEL --method s2ft ratio=0.05 --batch 4 --seq 256`"""

from __future__ import annotations

import argparse
import json
from typing import Any

from .config import build_base, build_method, load_config
from .models import torch_dtype


def add_parsers(commands: Any) -> None:
    parser = commands.add_parser(
        "estimate", help="memory and FLOPs of a training step, from the model's config alone: no weight is loaded"
    )
    parser.add_argument("model", help="folder of the model (its config.json is enough), or a training config (.yaml)")
    parser.add_argument(
        "--method",
        nargs="+",
        metavar=("NAME", "key=value"),
        help="s2ft, lora, ... and its options: --method s2ft ratio=0.05 (default: the training config's, else s2ft)",
    )
    parser.add_argument("--base", help="nf4, fp4, int8 (default: dense)")
    parser.add_argument("--batch", type=int, help="sequences per device (default: 1)")
    parser.add_argument("--seq", type=int, help="tokens per sequence (default: 1024)")
    parser.add_argument("--dtype", help="bfloat16, float32, ... (default: the model config's)")
    parser.add_argument("--optimizer", default="adamw", help="whose state to count (default: adamw)")
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="whose kernels to count (default: cpu)"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="run blocks again in the backward")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..estimate import estimate

    held = load_config(args.model) if args.model.endswith((".yaml", ".yml")) else {}
    method = _method(args, held)
    dtype = torch_dtype(args.dtype or held.get("dtype", "auto" if held else None), args.device)
    result = estimate(
        _model(held.get("model", args.model)),
        method,
        base=build_base(args.base or held.get("base")),
        batch=args.batch or int(held.get("per_device_train_batch_size", 1)),
        seq=args.seq or int(held.get("max_length", 1024)),
        dtype=None if dtype == "auto" else dtype,
        optimizer=args.optimizer,
        gradient_checkpointing=args.gradient_checkpointing or bool(held.get("gradient_checkpointing", False)),
        device=args.device,
    )
    print(json.dumps(result.to_dict(), indent=2) if args.json else result)


def _method(args: argparse.Namespace, held: dict[str, Any]) -> Any:
    """The method of the command line, or of the training config."""
    import yaml

    if args.method is None:
        return build_method(held.get("method", "s2ft"))
    name, *options = args.method
    given: dict[str, Any] = {"name": name}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"wanted key=value after the method's name, got {option!r}; such as ratio=0.05")
        given[key] = yaml.safe_load(value)
    return build_method(given)


def _model(path: str) -> Any:
    """The config in ``path``; it is what an estimate needs of a model."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)
