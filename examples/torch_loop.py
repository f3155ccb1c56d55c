"""A bare PyTorch loop: no Trainer, torch's own optimizer, gradient accumulation, clipping.

    python examples/torch_loop.py --model PATH --data train.jsonl --output adapter

Records: {"prompt", "completion"}, {"messages"}, {"text"} and the others of inlay.data.formats.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import inlay
from inlay.data import Collator, prepare


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args()


def main() -> None:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    inlay.tune(model, inlay.S2FT(ratio=0.03)).train()
    model.print_trainable_parameters()

    data = prepare(args.data, tokenizer, max_length=512)
    print(data.report)
    torch.manual_seed(0)
    batches = torch.utils.data.DataLoader(
        data, batch_size=args.batch, shuffle=True, collate_fn=Collator.for_model(model, tokenizer), drop_last=True
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate)  # any optimizer; inlay.optim.AdamW is faster

    for step, group in enumerate(groups(batches, args.accumulate, args.steps), start=1):
        # Each micro-batch is divided by the supervised tokens of the whole group: equal to one large batch.
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in group)
        total = 0.0
        for batch in group:
            loss = model(**batch, num_items_in_batch=tokens).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {total:.4f}")

    model.save_pretrained(args.output)
    print(f"adapter saved in {args.output}")


def groups(batches: torch.utils.data.DataLoader, size: int, count: int):
    """``count`` lists of ``size`` batches, starting over when the data end."""
    group: list[dict[str, torch.Tensor]] = []
    while count:
        for batch in batches:
            group.append(batch)
            if len(group) == size:
                yield group
                group, count = [], count - 1
                if not count:
                    return


if __name__ == "__main__":
    main()
