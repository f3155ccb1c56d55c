"""SwiGLU forward and backward against torch's eager pair and our own reference, bf16."""

import torch
from _bench import alternate, check, header, line
from torch.nn import functional

from inlay.ops.swiglu import swiglu_backward, swiglu_forward


def main() -> None:
    header("swiglu")
    for rows, width in ((1024, 1536), (1024, 8192)):
        gate, up, dh = (torch.randn(rows, width).bfloat16() for _ in range(3))
        indices = torch.randperm(width)[: width * 3 // 100].sort().values
        exact = functional.silu(gate.double()) * up.double()
        check(swiglu_forward(gate, up, "silu"), functional.silu(gate) * up, exact, "swiglu_forward")

        times = alternate(
            {
                "ours": lambda: swiglu_forward(gate, up, "silu"),
                "eager bf16": lambda: functional.silu(gate) * up,
                "reference": lambda: swiglu_forward.reference(gate, up, "silu"),
            }
        )
        line(f"forward [{rows}, {width}]", times, gigabytes=3 * 2 * gate.numel() / 1e9)

        g, u = gate.clone().requires_grad_(), up.clone().requires_grad_()
        h = functional.silu(g) * u
        times = alternate(
            {
                "ours": lambda: swiglu_backward(dh, gate, up, "silu", indices),
                "eager bf16": lambda: torch.autograd.grad(h, (g, u), dh, retain_graph=True),
                "reference": lambda: swiglu_backward.reference(dh, gate, up, "silu", indices),
            }
        )
        line(f"backward + h[..., I] [{rows}, {width}]", times, gigabytes=5 * 2 * gate.numel() / 1e9)


if __name__ == "__main__":
    main()
