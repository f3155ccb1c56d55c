"""QLoRA: a model quantized while it is loaded, LoRA on top, no bitsandbytes.

    python examples/qlora.py --model PATH --data train.jsonl --output adapter

PATH is a dense checkpoint, or one that bitsandbytes quantized: then its own bytes are used.
"""

from __future__ import annotations

import argparse

from transformers import AutoTokenizer

import inlay


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--r", type=int, default=16)
    return parser.parse_args()


def main() -> None:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # Quantized tensor by tensor: the dense model never exists whole.
    config = inlay.QuantizationConfig("nf4", double_quant=True)
    model = inlay.from_pretrained(args.model, quantization_config=config)
    inlay.tune(model, inlay.LoRA(r=args.r, lora_alpha=2 * args.r, lora_dropout=0.05))
    result = inlay.finetune(
        model,
        tokenizer,
        args.data,
        max_length=512,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        output_dir=args.output,
        save_strategy="no",
    )
    print(f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}; adapter saved in {args.output}")


if __name__ == "__main__":
    main()
