"""Loading models and tokenizers for the commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .config import load_config


def add_model_arguments(parser: argparse.ArgumentParser, *, adapter: bool) -> None:
    """--model, --gguf-file, --dtype and perhaps --adapter; a training config may stand in for them."""
    parser.add_argument("config", nargs="?", help="training config to take model and adapter from")
    parser.add_argument("--model", help="folder of the base model")
    parser.add_argument("--gguf-file", help="GGUF file in that folder, dequantized on load")
    parser.add_argument("--dtype", help="auto, checkpoint, bfloat16, float32, ...: see inlay.cli.config")
    if adapter:
        parser.add_argument("--adapter", help="folder of the adapter (default: the config's output_dir)")


def fill_from_config(args: argparse.Namespace) -> argparse.Namespace:
    """Fill what was not given on the command line from the config, and check that a model is known."""
    config = load_config(args.config) if args.config else {}
    for name, key in (("model", "model"), ("gguf_file", "gguf_file"), ("dtype", "dtype"), ("adapter", "output_dir")):
        if getattr(args, name, None) is None:
            setattr(args, name, config.get(key))
    if args.model is None:
        raise ValueError("wanted a model, got none; pass --model FOLDER or a training config")
    return args


def load_model(path: str, gguf_file: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """The causal language model, dense or quantized, and its tokenizer. A GGUF file is dequantized."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..integrations.quantizer import from_pretrained

    options: dict[str, Any] = {"dtype": torch_dtype(dtype)}
    if gguf_file is not None:
        from transformers import GgufConfig

        if not (Path(path) / gguf_file).is_file():
            raise FileNotFoundError(f"wanted the GGUF file {gguf_file} in {path}, got no such file")
        if options["dtype"] == "auto":
            # A GGUF file has no dtype of its own to dequantize to.
            options["dtype"] = torch_dtype("auto")
        options |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    else:  # ours, so that a checkpoint that bitsandbytes quantized needs no bitsandbytes
        model = from_pretrained(path, auto_class=AutoModelForCausalLM, **options)
    tokenizer = AutoTokenizer.from_pretrained(path, **({"gguf_file": gguf_file} if gguf_file else {}))
    return model, tokenizer


def torch_dtype(name: str | None, device: str | None = None) -> Any:
    """A torch dtype from its name: "auto" is bf16 where ``device``, or this machine, multiplies it, else fp32. For
    "checkpoint", or without a name, transformers' "auto": the one that the weights are stored in."""
    import torch

    from ..hardware import best_dtype

    if name in (None, "checkpoint"):
        return "auto"
    if name in ("auto", "fast"):
        return best_dtype(device)
    names = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
    dtype = getattr(torch, names.get(str(name), str(name)), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"wanted a dtype (auto, checkpoint, bfloat16, float32, float16), got {name!r}")
    return dtype
