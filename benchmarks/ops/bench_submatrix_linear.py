"""A linear layer with a submatrix delta against the bare linear and against the delta in plain torch, bf16."""

import torch
from _bench import alternate, check, header, line
from torch.nn import functional

from inlay.ops import DenseBase, submatrix_linear


def _step(layer, x, values, dy):
    return torch.autograd.grad(layer(x, values), (x, values), dy)


def main() -> None:
    header("submatrix_linear")
    for rows, width, out, chosen in ((1024, 1536, 576, 46), (1024, 576, 576, 18), (1024, 8192, 2048, 246)):
        x = torch.randn(rows, width).bfloat16().requires_grad_()
        weight, dy = (torch.randn(out, width) / 30).bfloat16(), torch.randn(rows, out).bfloat16()
        values = (torch.randn(out, chosen) / 30).requires_grad_()
        indices = torch.randperm(width)[:chosen].sort().values

        def ours(x, values, indices=indices, weight=weight):
            return submatrix_linear(x, values, indices, "in", DenseBase, weight)

        def plain(x, values, indices=indices, weight=weight):
            return functional.linear(x, weight) + functional.linear(x[..., indices], values.to(x.dtype))

        wide = functional.linear(x.double(), weight.double()) + x.double()[:, indices] @ values.double().t()
        check(ours(x, values), plain(x, values), wide, "submatrix_linear")
        times = alternate(
            {
                "ours": lambda: _step(ours, x, values, dy),
                "plain torch delta": lambda: _step(plain, x, values, dy),
                "bare linear": lambda: torch.autograd.grad(functional.linear(x, weight), x, dy),
            }
        )
        flops = (4 * rows * width * out + 6 * rows * chosen * out) / 1e9
        line(f"forward + backward [{rows}, {width}] -> {out}, s {chosen}", times, gigaflops=flops)


if __name__ == "__main__":
    main()
