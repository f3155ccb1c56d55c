"""`inlay generate`: answers of a base model, or of a base model with an adapter."""

from __future__ import annotations

import argparse
from typing import Any

from .models import add_model_arguments, fill_from_config, load_model


def add_parsers(commands: Any) -> None:
    parser = commands.add_parser("generate", help="answer prompts, with or without an adapter")
    add_model_arguments(parser, adapter=True)
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", action="store_true", help="leave the adapter out")
    parser.add_argument("--raw", action="store_true", help="do not put the prompt into the chat template")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch

    args = fill_from_config(args)
    model, tokenizer = load_model(args.model, args.gguf_file, args.dtype or "auto")
    if args.adapter and not args.base:
        from ..tune import load

        model = load(model, args.adapter)
    model.eval()
    torch.manual_seed(args.seed)
    for prompt in args.prompt:
        print(answer(model, tokenizer, prompt, args))


def answer(model: Any, tokenizer: Any, prompt: str, args: argparse.Namespace) -> str:
    if tokenizer.chat_template and not args.raw:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        batch = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        batch = tokenizer(prompt, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    ids = batch["input_ids"].to(model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=batch["attention_mask"].to(model.device),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **sampling,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
