"""`inlay train cfg.yaml key=value ...`"""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from .config import DATA_KEYS, MODEL_KEYS, build_base, build_method, load_config
from .init import MINIMAL
from .models import load_model


def add_parsers(commands: Any) -> None:
    example = f"a config, as `inlay init` writes it:\n\n{textwrap.indent(MINIMAL, '  ')}"
    parser = commands.add_parser(
        "train",
        help="fine-tune a model as a YAML config says",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config",
        help=f"YAML file; keys: method, base, {', '.join(sorted(MODEL_KEYS | DATA_KEYS))} and transformers' "
        "TrainingArguments",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override a key: learning_rate=1e-3 method.ratio=0.05"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..train import finetune

    config = load_config(args.config, args.overrides)
    for key in ("model", "method", "data", "output_dir"):
        if config.get(key) is None:
            raise ValueError(
                f"wanted the key {key!r} in {args.config}, got a config without it; add it, or pass {key}=..."
            )
    method = build_method(config.pop("method"))  # before the model: a typo should not cost a minute of loading
    base = build_base(config.pop("base", None))
    model, tokenizer = load_model(
        config.pop("model"), config.pop("gguf_file", None), config.pop("dtype", None) or "auto"
    )
    data = {key: config.pop(key) for key in DATA_KEYS & config.keys()}
    finetune(model, tokenizer, data.pop("data"), method=method, base=base, **data, **config)
    print(f"inlay: adapter saved in {config['output_dir']}")
