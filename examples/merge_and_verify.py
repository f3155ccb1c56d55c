"""Merge an adapter into its base on disk, shard by shard, and prove that the merged model answers the same.

python examples/merge_and_verify.py --model PATH --adapter adapter --output merged
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import inlay
from inlay.adapters import merge_files

PROMPTS = ("The capital of France is", "Once upon a time, in a small village by the sea,", "def fibonacci(n):")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--output", required=True)
    return parser.parse_args()


def main() -> None:
    args = parse()
    merge_files(args.model, args.adapter, args.output)  # one shard in memory; config, tokenizer and template copied

    tokenizer = AutoTokenizer.from_pretrained(args.output)
    # In fp32 only the order of sums differs; in bf16 a merge rounds once more than base + adapter does.
    tuned = inlay.load(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), args.adapter)
    merged = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    print(inlay.verify(tuned, merged, PROMPTS, tokenizer=tokenizer))
    print(f"merged model in {args.output}: from_pretrained, vLLM and llama.cpp's converter read it")


if __name__ == "__main__":
    main()
