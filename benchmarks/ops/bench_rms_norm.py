"""RMSNorm forward and backward against transformers' eager form and torch's own rms_norm, bf16."""

import torch
from _bench import alternate, check, header, line
from torch.nn import functional

from inlay.ops.rms_norm import rms_norm_backward, rms_norm_forward


def _eager(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def main() -> None:
    header("rms_norm")
    for rows, width in ((1024, 576), (1024, 4096)):
        x, dy, weight = (
            torch.randn(rows, width).bfloat16(),
            torch.randn(rows, width).bfloat16(),
            torch.randn(width).bfloat16(),
        )
        exact = functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
        check(rms_norm_forward(x, weight, 1e-5, 0.0)[0], _eager(x, weight), exact, "rms_norm_forward")
        times = alternate(
            {
                "ours": lambda: rms_norm_forward(x, weight, 1e-5, 0.0),
                "transformers eager": lambda: _eager(x, weight),
                "torch rms_norm": lambda: functional.rms_norm(x, (width,), weight, 1e-5),
            }
        )
        line(f"forward [{rows}, {width}]", times, gigabytes=2 * 2 * x.numel() / 1e9)

        _backward(rows, width, dy, x, weight)


def _backward(rows, width, dy, x, weight):
    """dx alone, and with dweight: the same bytes, one pass."""
    rstd = rms_norm_forward(x, weight, 1e-5, 0.0)[1]
    leaf, trained = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = _eager(leaf, trained)
    exact = (dy.double() * x.double() * rstd.double()[:, None]).sum(0)
    plain = torch.autograd.grad(y, trained, dy, retain_graph=True)[0]
    check(rms_norm_backward(dy, x, weight, rstd, 0.0, True, True)[1], plain, exact, "dweight")
    times = alternate(
        {
            "ours": lambda: rms_norm_backward(dy, x, weight, rstd, 0.0, True, False),
            "with dweight": lambda: rms_norm_backward(dy, x, weight, rstd, 0.0, True, True),
            "transformers eager": lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True),
            "transformers eager, with dweight": lambda: torch.autograd.grad(y, (leaf, trained), dy, retain_graph=True),
        }
    )
    line(f"backward [{rows}, {width}]", times, gigabytes=3 * 2 * x.numel() / 1e9)


if __name__ == "__main__":
    main()
