"""Supervised fine-tuning with TRL's SFTTrainer, which knows nothing of inlay.

    python examples/sft_trainer.py --model path/to/model --data train.jsonl --output adapter
    python examples/sft_trainer.py ... --method peft-lora --base nf4

Records of the .jsonl file are TRL's: {"prompt": ..., "completion": ...}, {"messages": [...]} or {"text": ...}.
The output is an adapter: PEFT reads all of them (S²FT's once inlay.integrations.peft is imported), inlay.load all but
peft-lora's.
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import inlay
from inlay.integrations.peft import S2FTConfig, accelerate_lora, fuse_blocks


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a causal language model and its tokenizer")
    parser.add_argument("--data", required=True, help=".json or .jsonl file")
    parser.add_argument("--output", required=True, help="directory for the adapter")
    parser.add_argument("--method", choices=("s2ft", "lora", "peft-s2ft", "peft-lora"), default="s2ft")
    parser.add_argument("--base", choices=("nf4", "fp4", "int8"), help="quantize the frozen weights")
    parser.add_argument("--dtype", default="bfloat16", help="of the base model")
    parser.add_argument("--ratio", type=float, default=0.03, help="S2FT: fraction of channels to train")
    parser.add_argument("--r", type=int, default=16, help="LoRA: rank")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--packing", action="store_true", help="several samples a row, which do not see each other")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> Any:
    """The base model, quantized while it is read if asked for."""
    if args.base is None:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    config = inlay.QuantizationConfig(args.base)
    return inlay.from_pretrained(args.model, dtype=args.dtype, quantization_config=config)


def prepare(model: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """The model to give the trainer, and its ``peft_config``: inlay's own form needs none."""
    if args.method == "s2ft":
        return inlay.tune(model, inlay.S2FT(ratio=args.ratio)), None
    if args.method == "lora":
        return inlay.tune(model, inlay.LoRA(r=args.r, lora_alpha=2 * args.r)), None
    if args.method == "peft-s2ft":
        return model, S2FTConfig(ratio=args.ratio, task_type="CAUSAL_LM")
    config = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="CAUSAL_LM")
    return fuse_blocks(model), accelerate_lora(config)


def main(argv: list[str] | None = None) -> SFTTrainer:
    args = arguments(argv)
    model, peft_config = prepare(load(args), args)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.output,
            learning_rate=args.learning_rate,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            gradient_checkpointing=args.checkpointing,
            max_length=args.max_length,
            packing=args.packing,
            bf16=False,  # the base is in its dtype already and the trainables are fp32: nothing to cast
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
