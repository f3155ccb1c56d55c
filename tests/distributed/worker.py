"""What each of two processes runs, started by torchrun:  worker.py {plain|trainer} OUT

"plain": DDP and FSDP2 as torch has them, every scenario after the other in one process group.
"trainer": inlay.finetune, which is transformers' Trainer and accelerate.
Rank 0 writes OUT/<scenario>.json, and adapters are saved in OUT/<scenario>.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "data")]

import families  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from scenarios import ENGINES, GLOBAL_BATCH, PLAIN, Scenario, batches, build, trained, trainer_run  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import inlay  # noqa: E402
from inlay.train import check_processes_agree  # noqa: E402


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def packed_bytes(model: nn.Module) -> int:
    """Bytes of four-bit codes this rank holds."""
    return sum(local(p).numel() for name, p in model.named_parameters() if name.endswith(".packed"))


def frozen_tensors(model: nn.Module) -> list[Tensor]:
    """What is the same on all ranks, so that nothing should send it around: packed codes and indices."""
    packed = [p.data for name, p in model.named_parameters() if name.endswith(".packed")]
    indices = [b for name, b in model.named_buffers() if name.endswith("s2ft_indices")]
    return packed[:1] + indices[:1]


def wrap(model: nn.Module, scenario: Scenario, facts: dict[str, Any]) -> nn.Module:
    """The model as ``scenario.engine`` runs it. DDP must not overwrite what differs on rank 1 in frozen tensors."""
    marked = frozen_tensors(model) if scenario.engine == "ddp" and dist.get_rank() == 1 else []
    for tensor in marked:
        tensor[0] ^= 1
    before = [int(tensor[0]) for tensor in marked]
    wrapped = ENGINES[scenario.engine](model)
    facts["marks_kept"] = before == [int(tensor[0]) for tensor in marked]
    for tensor, value in zip(marked, before):
        tensor[0] = value ^ 1
    return wrapped


def run_plain(scenario: Scenario, out: Path) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(scenario)
    facts: dict[str, Any] = {"packed_before": packed_bytes(model), "losses": []}
    wrapped = wrap(model, scenario, facts)
    facts["packed_after"] = packed_bytes(model)
    share = slice(rank * GLOBAL_BATCH // world, (rank + 1) * GLOBAL_BATCH // world)
    mine = ({key: value[share] for key, value in batch.items()} for batch in batches(scenario))
    for loss in trained(wrapped, scenario, mine):
        dist.all_reduce(loss)  # as many supervised tokens on each rank
        facts["losses"].append(float(loss) / world)
    facts["trainable_dtypes"] = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})
    if scenario.engine == "ddp":
        facts["synced_buffers"] = [name for name in wrapped.named_module_buffers if ".deltas." in name]
        model.save_pretrained(str(out / str(scenario)), is_main_process=rank == 0)
    else:
        model.save_pretrained(str(out / str(scenario)))  # by all ranks: it gathers
        if scenario.method == "full":
            model.save_pretrained(str(out / f"{scenario}-delta"), delta=True)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, facts)
    return {**facts, "ranks": everyone}


def disagreement(change: str) -> str:
    """What is said where rank 1 has another seed or another base, or nothing has changed."""
    model = families.llama()
    if change == "base" and dist.get_rank() == 1:
        model.model.layers[0].self_attn.o_proj.weight.data += 0.01
    inlay.tune(model, inlay.S2FT(ratio=0.25, seed=dist.get_rank() if change == "seed" else 0))
    try:
        check_processes_agree(model)
    except ValueError as error:
        return str(error)
    return ""


def green_choices() -> list[list[bool]]:
    """What GreenTrainer trains on each rank after measuring, where they measured and weighed differently."""
    model = inlay.tune(families.llama(num_hidden_layers=4), inlay.GreenTrainer(rho=0.9, every=20)).train()
    schedule, optimizer = model.inlay_schedules["default"], torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(8):
        model(**families.text_batch(step)).loss.backward()
        if step == 6 and dist.get_rank() == 1:
            schedule.clock["importance"].reverse()
        optimizer.step()
        optimizer.zero_grad()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, schedule.chosen_mask.tolist())
    return everyone


def plain(out: Path) -> None:
    dist.init_process_group("gloo")
    (out / "green.json").write_text(json.dumps(green_choices()))
    said = {change: disagreement(change) for change in ("nothing", "seed", "base")}
    (out / f"disagreement.{dist.get_rank()}.json").write_text(json.dumps(said))
    for scenario in PLAIN:
        facts = run_plain(scenario, out)
        if dist.get_rank() == 0:
            (out / f"{scenario}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


def trainer(out: Path) -> None:
    result = trainer_run(out / "trainer", per_device_train_batch_size=GLOBAL_BATCH // 2)
    if dist.get_rank() == 0:
        facts = {"losses": result.losses, "tokens": result.tokens_per_second * result.seconds}
        (out / "trainer.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"plain": plain, "trainer": trainer}[sys.argv[1]](Path(sys.argv[2]))
