"""A mixture's experts: forward beside transformers' ways, training with LoRA beside PEFT's target_parameters.

64 experts of 1,024 x 512, 8 a token, 1,024 tokens, bf16 (``--tokens``, ``--experts`` for others). Correctness first.
"""

import argparse
import gc

import peft
import torch
from _bench import _measure, alternate, check, header, line
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from inlay.nn.blocks import install_blocks
from inlay.nn.expert_layout import layout_of
from inlay.nn.experts import hold_experts
from inlay.ops.expert_linear import expert_grad, expert_matmul, plan_rows
from inlay.pieces.experts import ExpertsLowRank

HIDDEN, INNER, CHOSEN, RANK = 1024, 512, 8, 16
STACKS = ["gate_up_proj", "down_proj"]


def layer(experts: int, way: str = "eager", dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=experts)
    config._experts_implementation = way
    made = Qwen3MoeExperts(config)
    random = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random).div_(parameter.shape[-1] ** 0.5).to(dtype)
    return made.requires_grad_(False)


def lora_here(experts: int) -> torch.nn.Module:
    made = layer(experts)
    piece = ExpertsLowRank(made, layout_of(made), STACKS, RANK, 2.0)
    install_blocks(made)
    held = hold_experts(made, "experts")
    held.add_delta("default", piece)
    held.activate(("default",))
    return held


def lora_in_peft(experts: int, way: str) -> torch.nn.Module:
    outer = torch.nn.ModuleDict({"experts": layer(experts, way)})
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=[f"experts.{s}" for s in STACKS]
    )
    return peft.inject_adapter_in_model(config, outer)["experts"]


def step(module: torch.nn.Module, inputs: list[torch.Tensor]) -> None:
    x, index, weights = inputs
    x = x.clone().requires_grad_(True)
    module(x, index, weights).sum().backward()
    for parameter in module.parameters():
        parameter.grad = None


def memory(module: torch.nn.Module, inputs: list[torch.Tensor]) -> float:
    """MiB that a step takes above what is there."""
    step(module, inputs)
    gc.collect()
    found = []
    for _ in range(3):  # the smallest: what the allocator keeps of an earlier step is not asked for
        before = _measure.reset_peak("cpu")
        step(module, inputs)
        found.append((_measure.peak("cpu") - before) / 2**20)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    given, _ = parser.parse_known_args()
    tokens, experts = given.tokens, given.experts
    header("expert_linear")
    torch.manual_seed(0)
    x = torch.randn(tokens, HIDDEN).bfloat16()
    index = torch.rand(tokens, experts).topk(CHOSEN).indices
    weights = torch.rand(tokens, CHOSEN).softmax(-1).bfloat16()
    inputs = [x, index, weights]
    flops = 6e-9 * tokens * CHOSEN * HIDDEN * INNER
    with torch.no_grad():
        ways = {way: layer(experts, way) for way in ("eager", "grouped_mm", *(["batched_mm"] if tokens <= 16 else []))}
        fused = layer(experts)
        install_blocks(fused)
        exact = layer(experts, "eager", torch.float32).double()(x.double(), index, weights.double())
        check(fused(*inputs), ways["eager"](*inputs), exact, "forward")
        times = alternate({way: lambda m=m: m(*inputs) for way, m in {"ours": fused, **ways}.items()}, seconds=2)
        line(f"forward, {tokens} tokens", times, gigaflops=flops)
    models = {
        "ours": lora_here(experts),
        "PEFT": lora_in_peft(experts, "grouped_mm"),
        "PEFT eager": lora_in_peft(experts, "eager"),
    }
    times = alternate({name: lambda m=m: step(m, inputs) for name, m in models.items()}, seconds=6, least=3)
    line(f"LoRA r={RANK}, a step of {tokens} tokens", times, gigaflops=2 * flops)
    for name, module in models.items():
        print(f"  {name:12} {memory(module, inputs):8.1f} MiB above the layer")
    plan = plan_rows(index, experts)
    stack = fused.gate_up_proj.transpose(1, 2)
    dy = torch.randn(plan.rows.shape[0], 2 * INNER).bfloat16()
    xs = x[plan.rows]
    offsets = plan.offsets[1:].int()
    with torch.no_grad():
        times = alternate(
            {
                "ours": lambda: expert_matmul(x, stack, plan, gather=True),
                "grouped_mm": lambda: torch.nn.functional.grouped_mm(xs, stack, offs=offsets),
            },
            seconds=1,
        )
        line("one product of gate and up", times, gigaflops=flops * 2 / 3)
        narrow = torch.randn(experts, 2 * INNER, RANK)
        inner = torch.randn(plan.rows.shape[0], RANK).bfloat16()
        line("gradient of B", alternate({"ours": lambda: expert_grad(narrow, dy, inner, plan, plan.all)}, seconds=0.5))


if __name__ == "__main__":
    main()
