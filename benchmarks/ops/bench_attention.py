"""Grouped-query attention against torch's SDPA on the CPU, bf16: forward, and forward + backward.

Heads of SmolLM2 (9 of queries, 3 of keys, width 64), and wider ones; causal, and with masks. Instruction sets below the
machine's best are compared like with like:

    INLAY_ISA=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 MKL_ENABLE_INSTRUCTIONS=AVX512_E2
    INLAY_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
"""

from __future__ import annotations

import torch
from _bench import alternate, check, header, line
from torch import Tensor
from torch.nn import functional

from inlay import _native
from inlay.ops import attention
from inlay.ops.attention import mask_of

SHAPES = (  # batch, query heads, key heads, tokens, width
    (32, 9, 3, 20, 64),
    (4, 9, 3, 256, 64),
    (1, 9, 3, 2048, 64),
    (1, 32, 8, 512, 128),
)


def padded(batch: int, tokens: int) -> Tensor:
    """Rows of a half to all of the tokens, padded at the right."""
    lengths = torch.linspace(tokens // 2, tokens, batch).long()[:, None]
    ends = torch.minimum(torch.arange(1, tokens + 1), lengths)
    return torch.stack((torch.zeros_like(ends), ends), -1)


def packed(tokens: int, samples: int) -> Tensor:
    at = torch.arange(tokens)
    return torch.stack((at // (tokens // samples) * (tokens // samples), at + 1), -1)[None]


def measure(name: str, shape: tuple[int, ...], spans: Tensor | None = None) -> None:
    batch, heads, groups, tokens, width = shape
    q, k, v = (
        torch.randn(batch, tokens, h, width).bfloat16().transpose(1, 2).requires_grad_()
        for h in (heads, groups, groups)
    )
    do = torch.randn(batch, heads, tokens, width).bfloat16()
    mask = None if spans is None else mask_of(spans, tokens, tokens, q.device)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, spans=spans)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != groups
        )

    def step(attend) -> tuple[Tensor, ...]:
        out = attend(q, k, v)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), do)

    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact_out = theirs(*wide)
    exact = (exact_out, *torch.autograd.grad(exact_out, wide, do.double()))
    for what, got, plain, wanted in zip(("out", "dq", "dk", "dv"), step(ours), step(theirs), exact, strict=True):
        check(got, plain, wanted, what)
    with torch.no_grad():
        forward = alternate({"ours": lambda: ours(q, k, v), "torch SDPA": lambda: theirs(q, k, v)})
    both = alternate({"ours": lambda: step(ours), "torch SDPA": lambda: step(theirs)})
    scores = batch * tokens * tokens / 2 if spans is None else float(mask.expand(batch, -1, -1, -1).sum())
    case = f"{_native.module().isa()}, {name}, {batch} x {tokens}, {heads}/{groups} heads of {width}"
    line(f"{case}, forward", forward, gigaflops=4 * heads * scores * width / 1e9)
    line(f"{case}, forward + backward", both, gigaflops=14 * heads * scores * width / 1e9)


def main() -> None:
    header("attention")
    for shape in SHAPES:
        measure("causal", shape)
    measure("padded", (4, 9, 3, 256, 64), padded(4, 256))
    measure("8 samples", (1, 9, 3, 2048, 64), packed(2048, 8))


if __name__ == "__main__":
    main()
