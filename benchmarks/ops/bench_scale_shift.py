"""A scale and a shift per channel, forward and backward, against plain torch as methods write it, bf16."""

import torch
from _bench import alternate, check, header, line

from inlay.ops.scale_shift import scale_shift_backward, scale_shift_forward


def _eager(x, gamma, beta):
    return (x * gamma + beta).to(x.dtype)  # fp32 by promotion


def main() -> None:
    header("scale_shift")
    for rows, width in ((1024, 576), (1024, 4096)):
        x, dy = (torch.randn(rows, width).bfloat16() for _ in range(2))
        gamma, beta = torch.randn(width), torch.randn(width)
        exact = x.double() * gamma.double() + beta.double()
        check(scale_shift_forward(x, gamma, beta, None), _eager(x, gamma, beta), exact, "scale_shift_forward")
        heads = torch.arange(width // 4, width // 2)  # a quarter of the heads
        times = alternate(
            {
                "ours": lambda: scale_shift_forward(x, gamma, beta, None),
                "at a quarter of the channels": lambda: scale_shift_forward(x, gamma[heads], beta[heads], heads),
                "eager": lambda: _eager(x, gamma, beta),
            }
        )
        line(f"forward [{rows}, {width}]", times, gigabytes=2 * 2 * x.numel() / 1e9)

        leaves = [t.clone().requires_grad_() for t in (x, gamma, beta)]
        y = _eager(*leaves)
        exact_sum = (dy.double() * x.double()).sum(0)
        plain = torch.autograd.grad(y, leaves[1], dy, retain_graph=True)[0]
        ours = scale_shift_backward(dy, x, gamma, None, True, True, True)
        check(ours[1], plain, exact_sum, "dgamma")
        times = alternate(
            {
                "ours": lambda: scale_shift_backward(dy, x, gamma, None, True, True, True),
                "dx alone": lambda: scale_shift_backward(dy, None, gamma, None, True, False, False),
                "eager": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
            }
        )
        line(f"backward [{rows}, {width}]", times, gigabytes=3 * 2 * x.numel() / 1e9)


if __name__ == "__main__":
    main()
