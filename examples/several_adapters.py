"""Several adapters on one base: train two, switch between them, add them up, swap one for another in place.

python examples/several_adapters.py --model PATH --data first.jsonl --other-data second.jsonl --output adapters
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import inlay


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--other-data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--prompt", default="Hello")
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for name, data in (("first", args.data), ("second", args.other_data)):
        model = inlay.tune(AutoModelForCausalLM.from_pretrained(args.model), inlay.S2FT(ratio=0.03, seed=len(name)))
        inlay.finetune(model, tokenizer, data, max_steps=args.steps, learning_rate=2e-3)
        model.save_pretrained(f"{args.output}/{name}")

    # One base in memory, both adapters on it.
    model = inlay.load(AutoModelForCausalLM.from_pretrained(args.model), f"{args.output}/first", name="first")
    inlay.load(model, f"{args.output}/second", name="second")
    model.eval()
    for name in ("first", "second"):
        model.set_adapter(name)
        print(f"{name}: {answer(model, tokenizer, args.prompt)!r}")

    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "both")
    model.set_adapter("both")
    print(f"half of each: {answer(model, tokenizer, args.prompt)!r}")
    with inlay.disabled(model):
        print(f"base: {answer(model, tokenizer, args.prompt)!r}")

    # The same tensors, other values: a server keeps its compiled model and its CUDA graphs.
    model.set_adapter("first")
    model.hotswap_adapter(f"{args.output}/second", "first")
    print(f"'first' after taking over the second's values: {answer(model, tokenizer, args.prompt)!r}")


def answer(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
