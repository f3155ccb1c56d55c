"""What a run's peak memory should be, by :func:`inlay.estimate`, to stand beside what was measured."""

from __future__ import annotations

from typing import Any

from ..estimate import OPTIMIZERS, estimate

#: What a run on a CPU takes beyond its longest step: batches of other shapes leave holes in the C library's heap, and
#: oneDNN keeps the code it makes for each shape. Fitted, on the five kinds of data of benchmarks/run_memory.py.
RUN_SHARE = 0.17


def expected_peak(trainer: Any) -> int | None:
    """Bytes above the tuned model of the run; None, and a line saying why, where none can be told.

    That of a step on the longest batch, and on a CPU :data:`RUN_SHARE` more. Evaluation computes no logits and keeps
    nothing, so that it stays below. A run must not fail for want of an estimate, whatever the model's code does on
    tensors without data.
    """
    args = trainer.args
    if args.bf16 or args.fp16:
        return None  # autocast: activations are of another dtype than the weights that the estimate sees
    try:
        found = estimate(
            trainer.model,
            batch=min(args.train_batch_size, len(trainer.train_dataset)),
            seq=_longest(trainer),
            optimizer=args.optim if args.optim in OPTIMIZERS else "adamw",
            gradient_checkpointing=args.gradient_checkpointing,
            device=args.device.type,
        )
    except Exception as error:
        print(f"inlay: no estimate of memory: {' '.join(str(error).split())}")
        return None
    buckets = found.gradients if args.world_size > 1 else 0  # DDP's copies
    peak = found.peak * (1 + RUN_SHARE) if args.device.type == "cpu" else found.peak
    return int(peak) - found.trainable + buckets


def _longest(trainer: Any) -> int:
    """Tokens of the longest sample, padded as the collator does."""
    multiple = trainer.data_collator.multiple_of
    return -(-max(trainer.train_dataset.lengths) // multiple) * multiple
