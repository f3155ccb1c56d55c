"""Data-parallel training by torchrun, in a bare PyTorch loop: one process per GPU, or per CPU socket.

    torchrun --nproc-per-node 2 examples/ddp.py --model PATH --data train.jsonl --output adapter

On GPUs `accelerate launch --multi_gpu --num_processes 2 examples/ddp.py ...` sets the same environment variables.
`inlay.finetune` does the same under torchrun with no extra line; this shows what it takes without a Trainer.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

import inlay
from inlay.data import Collator, prepare
from inlay.train import check_processes_agree


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--base", help="nf4, fp4 or int8 (default: dense)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2, help="samples per process")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args()


def main() -> None:
    args = parse()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    inlay.tune(model, inlay.S2FT(ratio=0.03), base=args.base).train()  # the same channels everywhere: same seed
    check_processes_agree(model)
    wrapped = DistributedDataParallel(model, device_ids=[device.index] if on_gpu else None)

    data = prepare(args.data, tokenizer, max_length=512)
    sampler = DistributedSampler(data, shuffle=True, seed=0)
    collate = Collator.for_model(model, tokenizer)
    batches = endless(DataLoader(data, batch_size=args.batch, sampler=sampler, collate_fn=collate), sampler)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = inlay.optim.AdamW(trainable, lr=args.learning_rate)

    for step in range(1, args.steps + 1):
        batch = {key: value.to(device) for key, value in next(batches).items()}
        # Divided by the supervised tokens of all ranks, times the ranks that DDP averages over: one large batch.
        tokens = (batch["labels"][:, 1:] != -100).sum()
        dist.all_reduce(tokens)
        loss = wrapped(**batch, num_items_in_batch=tokens).loss * world
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {float(mean):.4f}", flush=True)

    model.save_pretrained(args.output, is_main_process=rank == 0)
    dist.barrier()  # who leaves while another still saves can take the connection with it
    dist.destroy_process_group()


def endless(loader: DataLoader, sampler: DistributedSampler):
    """Batches for ever, in another order each time round."""
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


if __name__ == "__main__":
    main()
