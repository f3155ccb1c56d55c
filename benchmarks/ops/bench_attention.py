"""Causal grouped-query attention, forward + backward, against torch's SDPA (flash) on the CPU, bf16."""

import torch
from _bench import alternate, check, header, line
from torch.nn import functional

from inlay.ops import causal_attention


def _sdpa(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def main() -> None:
    header("attention")
    for batch, heads, groups, tokens, width in ((4, 9, 3, 256, 64), (1, 9, 3, 1024, 64), (1, 32, 8, 512, 128)):
        q, k, v = (
            torch.randn(batch, tokens, h, width).bfloat16().transpose(1, 2).requires_grad_()
            for h in (heads, groups, groups)
        )
        do = torch.randn(batch, heads, tokens, width).bfloat16()
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        exact = torch.autograd.grad(_sdpa(*wide), wide, do.double())
        theirs = torch.autograd.grad(_sdpa(q, k, v), (q, k, v), do)
        for name, got, plain, wanted in zip(
            ("dq", "dk", "dv"),
            torch.autograd.grad(causal_attention(q, k, v), (q, k, v), do),
            theirs,
            exact,
            strict=True,
        ):
            check(got, plain, wanted, name)
        times = alternate(
            {
                "ours": lambda: torch.autograd.grad(causal_attention(q, k, v), (q, k, v), do),
                "torch SDPA": lambda: torch.autograd.grad(_sdpa(q, k, v), (q, k, v), do),
                "forward alone": lambda: _sdpa(q.detach(), k.detach(), v.detach()),
            }
        )
        flops = 7 * batch * heads * tokens * tokens * width / 1e9  # causal half of 2·7 products
        line(f"[{batch}, {heads}/{groups}, {tokens}, {width}]", times, gigaflops=flops)


if __name__ == "__main__":
    main()
