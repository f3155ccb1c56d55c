"""The same training in one process and in two: models, batches and steps both sides share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import methods
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import inlay
from inlay.schedules import active_schedules

GLOBAL_BATCH, TOKENS, STEPS = 4, 11, 4

METHODS = {
    "s2ft": methods.BY_NAME["s2ft"].make,
    "lora": lambda: methods.BY_NAME["lora"].make(lora_alpha=32),  # smaller, Adam would show roundings of A
    "exact": methods.BY_NAME["s2ft-exact"].make,
    "lisa": lambda: inlay.LISA(layers=1, every=1),
    "hft": lambda: inlay.HFT(redraw_every=2),
    "full": inlay.Full,
    "green": lambda: inlay.GreenTrainer(rho=0.6, every=2, cost="flops"),
    "tied": lambda: inlay.TokenRows(tokens=list(range(3, 40))),
    "whole": lambda: inlay.S2FT(ratio=0.25, modules_to_save=["lm_head", "norm"]),
}
BASES = {"dense": None, "nf4": "nf4", "nested": inlay.BaseConfig("nf4", double_quant=True)}


@dataclass(frozen=True)
class Scenario:
    """One run: how processes share the work, what is trained, on what base, by which optimizer."""

    engine: str
    method: str
    base: str
    optimizer: str = "inlay"

    def __str__(self) -> str:
        return f"{self.engine}-{self.method}-{self.base}-{self.optimizer}"


PLAIN = [
    *(
        Scenario(engine, method, base)
        for engine in ("ddp", "fsdp")
        for method in ("s2ft", "lora")
        for base in ("dense", "nf4")
    ),
    Scenario("ddp", "exact", "nf4"),
    Scenario("ddp", "whole", "dense"),
    Scenario("ddp", "tied", "dense"),
    Scenario("fsdp", "tied", "dense"),
    Scenario("ddp", "lisa", "dense"),
    Scenario("ddp", "hft", "dense"),
    Scenario("ddp", "green", "dense"),
    Scenario("fsdp", "full", "dense"),
    Scenario("fsdp", "lisa", "dense"),
    Scenario("fsdp", "hft", "dense"),
    Scenario("fsdp", "green", "dense"),
    Scenario("fsdp", "whole", "nf4"),
    Scenario("fsdp", "exact", "nf4"),
    Scenario("fsdp", "s2ft", "nested"),
    Scenario("fsdp", "lora", "dense", "torch"),
]


def shard(model: nn.Module) -> nn.Module:
    """FSDP2: every block a unit of its own, the rest with the root."""
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def replicate(model: nn.Module) -> nn.Module:
    """DDP; where a schedule changes what trains, gradients have to be looked for."""
    return DistributedDataParallel(model, find_unused_parameters=bool(active_schedules(model)))


ENGINES = {"ddp": replicate, "fsdp": shard}


def plain(scenario: Scenario) -> nn.Module:
    """The base model."""
    return families.llama(tie_word_embeddings=scenario.method == "tied")


def build(scenario: Scenario) -> nn.Module:
    """The tuned model, the same in every process."""
    return inlay.tune(plain(scenario), METHODS[scenario.method](), base=BASES[scenario.base]).train()


def batches(scenario: Scenario) -> Iterator[dict[str, Tensor]]:
    """Global batches, every token supervised."""
    random = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        tokens = torch.randint(3, families.VOCABULARY, (GLOBAL_BATCH, TOKENS), generator=random)
        yield {"input_ids": tokens, "labels": tokens}


def trained(model: nn.Module, scenario: Scenario, given: Iterable[dict[str, Tensor]]) -> Iterator[Tensor]:
    """Train on the batches, clipping gradients; the loss of each step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    kinds = {"inlay": inlay.optim.AdamW, "torch": torch.optim.AdamW}
    whole = scenario.method in ("full", "lisa", "hft", "green")
    eps = 1e-4 if whole else 1e-8  # gradients that are rounding alone make no full step
    decay = 0.0 if scenario.method == "full" else 0.01  # without it, rows of tokens that never come stay as they are
    optimizer = kinds[scenario.optimizer](trainable, lr=1e-2, eps=eps, weight_decay=decay)
    for batch in given:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def trainer_run(out: Path, **arguments: Any) -> Any:
    """inlay.finetune on a toy model; samples of different length, so that a mean of means would differ."""
    from toys import build_model, build_tokenizer

    words = ["cat", "mat", "hello", "there", "sat", "user", "system", "answer"]
    records = [{"prompt": f"{word}:", "completion": f" {word[::-1]} " * (1 + i % 3)} for i, word in enumerate(words)]
    return inlay.finetune(
        build_model(),
        build_tokenizer(),
        records,
        method=inlay.S2FT(ratio=0.25),
        output_dir=str(out),
        save_strategy="no",
        max_steps=6,
        learning_rate=1e-2,
        logging_steps=2,
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
