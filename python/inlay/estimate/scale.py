"""An estimate spread over several GPUs: what each holds, and what each sends per step.

Derived in docs/scale.md, with W the bytes of weights in blocks, U those of the largest block, R those outside the
blocks (embedding, head), T the adapter's fp32 parameters, A what a step adds (activations and workspace):

    DDP     memory  W + R + T + state + gradients + buckets (as large as the gradients) + A
            sent    2·(N-1)/N·T                                  ring all-reduce of the gradients
    FSDP2   memory  (W + R)/N + R + 2·U + (T + state + gradients)/N + A
            sent    (N-1)/N·(2·W + R + 3·T)                        gathered in forward and backward; reduce-scatter
"""

from __future__ import annotations

from dataclasses import dataclass

from .report import GRADIENTS, Estimate

ENGINES = ("ddp", "fsdp2")


@dataclass(frozen=True)
class PerGPU:
    """Bytes on one of ``gpus``, and bytes it sends in a step.

    Attributes:
        weights: held all the time. gathered: whole copies of sharded weights while they are used.
        states: adapter, gradients and optimizer state. step: activations and workspace. sent: per step.
    """

    gpus: int
    engine: str
    weights: int
    gathered: int
    states: int
    step: int
    sent: int

    @property
    def memory(self) -> int:
        """Peak of the GPU."""
        return self.weights + self.gathered + self.states + self.step


def per_gpu(estimate: Estimate, gpus: int, engine: str) -> PerGPU:
    """What one of ``gpus`` holds and sends when ``engine`` ("ddp" or "fsdp2") runs the step of ``estimate`` on each.

    Raises:
        ValueError: an unknown engine, or no GPU.
    """
    if engine not in ENGINES or gpus < 1:
        raise ValueError(f"wanted an engine of {ENGINES} on 1 GPU or more, got {engine!r} on {gpus}")
    blocks, largest, rest = (estimate.units[key] for key in ("blocks", "largest", "rest"))
    trainable = estimate.trainable
    states = trainable + estimate.optimizer_state + estimate.gradients
    step = sum(size for kind, size in estimate.at_peak.items() if kind != GRADIENTS) + estimate.runtime[1]
    others = gpus - 1
    if engine == "ddp":
        buckets = trainable if gpus > 1 else 0
        return PerGPU(gpus, engine, blocks + rest, 0, states + buckets, step, 2 * others * trainable // gpus)
    gathered = rest + 2 * largest if gpus > 1 else 0
    sent = others * (2 * blocks + rest + 3 * trainable) // gpus
    return PerGPU(gpus, engine, (blocks + rest) // gpus, gathered, states // gpus, step, sent)
