"""The gated delta rule against transformers' fallback (no Triton) on the CPU, bf16: the op, and a block around it.

Heads of Qwen3.5 (16 of keys and of values) and Qwen3-Next (16 of keys, 32 of values), all 128 wide.
"""

from __future__ import annotations

import copy

import torch
import transformers
from _bench import alternate, check, header, line
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, torch_chunk_gated_delta_rule

from inlay import _native
from inlay.nn.blocks import install_blocks
from inlay.ops import force_path, gated_delta_rule

EPS, WIDTH = 1e-6, 128
SHAPES = (  # batch, tokens, key heads, value heads
    (1, 256, 16, 16),
    (4, 256, 16, 16),
    (1, 1024, 16, 32),
    (1, 2048, 16, 16),
)
NAMES = ("out", "dq", "dk", "dv", "dg", "dbeta")


def ours(*inputs: Tensor) -> Tensor:
    return gated_delta_rule(*inputs, norm_eps=EPS)[0]


def theirs(*inputs: Tensor) -> Tensor:
    return torch_chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)[0]


def inputs_of(batch: int, tokens: int, groups: int, heads: int) -> list[Tensor]:
    """As a model hands them on: gates in fp32, decays of a few percent a token."""
    made = [torch.randn(batch, tokens, count, WIDTH).bfloat16() for count in (groups, groups, heads)]
    made += [-0.05 * torch.rand(batch, tokens, heads), torch.rand(batch, tokens, heads)]
    return [t.requires_grad_() for t in made]


def measure(batch: int, tokens: int, groups: int, heads: int) -> None:
    inputs = inputs_of(batch, tokens, groups, heads)
    dout = torch.randn(batch, tokens, heads, WIDTH).bfloat16()

    def step(rule, inputs: list[Tensor], dout: Tensor = dout) -> tuple[Tensor, ...]:
        out = rule(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, dout)

    with force_path("reference"):
        exact = step(ours, [t.detach().double().requires_grad_() for t in inputs], dout.double())
    for name, got, plain, wanted in zip(NAMES, step(ours, inputs), step(theirs, inputs), exact, strict=True):
        check(got, plain, wanted, name)
    with torch.no_grad():
        forward = alternate({"ours": lambda: ours(*inputs), "transformers": lambda: theirs(*inputs)})
    both = alternate({"ours": lambda: step(ours, inputs), "transformers": lambda: step(theirs, inputs)})
    case = f"{_native.module().isa()}, {batch} x {tokens}, {groups}/{heads} heads of {WIDTH}"
    line(f"{case}, forward", forward)
    line(f"{case}, forward + backward", both)


def measure_block(batch: int, tokens: int) -> None:
    """Qwen3.5's of 1024 channels, frozen: its linears, convolution, rule and gated norm, forward and input gradient."""
    config = transformers.Qwen3_5TextConfig(
        hidden_size=1024,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=WIDTH,
        linear_value_head_dim=WIDTH,
    )
    plain = Qwen3_5GatedDeltaNet(config, 0).requires_grad_(False)
    exact, plain = copy.deepcopy(plain), plain.bfloat16()
    fused = copy.deepcopy(plain)
    install_blocks(fused)
    x, dy = torch.randn(batch, tokens, 1024).bfloat16().requires_grad_(), torch.randn(batch, tokens, 1024).bfloat16()

    def step(block, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        y = block(x)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    wanted = step(exact.to(torch.float32), x.detach().float().requires_grad_(), dy.float())
    for name, got, other, want in zip(("y", "dx"), step(fused, x, dy), step(plain, x, dy), wanted, strict=True):
        check(got, other, want, name)
    times = alternate({"ours": lambda: step(fused, x, dy), "transformers": lambda: step(plain, x, dy)})
    line(f"{_native.module().isa()}, {batch} x {tokens}, a block of Qwen3.5, 1024 channels", times)


def main() -> None:
    header("gated delta rule")
    transformers.logging.set_verbosity_error()
    for shape in SHAPES:
        measure(*shape)
    measure_block(1, 1024)
    measure_block(4, 256)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
