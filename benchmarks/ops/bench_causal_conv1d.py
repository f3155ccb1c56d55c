"""The causal convolution with silu of linear attention against torch's, as transformers calls it, bf16."""

from __future__ import annotations

import torch
from _bench import alternate, check, header, line
from torch import Tensor
from torch.nn import functional

from inlay.ops import causal_conv1d


def _eager(x: Tensor, weight: Tensor) -> Tensor:
    """From and to rows of tokens, as the projections before it and the attention behind it have them."""
    z = functional.conv1d(x.mT, weight[:, None], padding=weight.shape[1] - 1, groups=x.shape[2])
    return functional.silu(z[..., : x.shape[1]]).mT.contiguous()


def main() -> None:
    header("causal_conv1d")
    for batch, tokens, channels in ((1, 1024, 6144), (4, 256, 6144), (1, 2048, 8192)):
        x, dy = torch.randn(batch, tokens, channels).bfloat16().requires_grad_(), torch.randn(batch, tokens, channels)
        weight, dy = torch.randn(channels, 4).bfloat16(), dy.bfloat16()

        def step(convolution, x: Tensor, weight: Tensor = weight, dy: Tensor = dy) -> tuple[Tensor, Tensor]:
            y = convolution(x, weight)
            return y.detach(), torch.autograd.grad(y, x, dy)[0]

        exact = step(_eager, x.detach().double().requires_grad_(), weight.double(), dy.double())
        for name, *each in zip(("y", "dx"), step(causal_conv1d, x), step(_eager, x), exact, strict=True):
            check(*each, name)
        with torch.no_grad():
            forward = alternate({"ours": lambda: causal_conv1d(x, weight), "torch": lambda: _eager(x, weight)})
        both = alternate({"ours": lambda: step(causal_conv1d, x), "torch": lambda: step(_eager, x)})
        case, size = f"[{batch}, {tokens}, {channels}] x 4 taps", 2 * x.numel() / 1e9
        line(f"{case}, forward", forward, gigabytes=2 * size)
        line(f"{case}, forward + backward", both, gigabytes=5 * size)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
