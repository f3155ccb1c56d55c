"""One training step of a linear with LoRA, r = 16, bf16: dense and nf4 bases, against the bare linear, the eager
composition, and PEFT on bitsandbytes (if both are installed)."""

import torch
from _bench import alternate, check, header, line
from torch import nn
from torch.nn import functional

from inlay.bases import FourBit
from inlay.ops import DenseBase
from inlay.ops.lora_linear import lora_linear

try:
    import bitsandbytes as bnb
    import peft
except ImportError:
    bnb = peft = None

RANK, SCALE = 16, 2.0
SHAPES = ((1024, 576, 576), (1024, 576, 1536), (1024, 2048, 2048), (512, 4096, 4096))


def peer(dense: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> nn.Module:
    """PEFT's LoRA on a double-quantized NF4 ``Linear4bit``, with the same factors."""
    out, width = dense.shape
    linear = bnb.nn.Linear4bit(width, out, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    linear.weight.data = dense
    model = peft.get_peft_model(
        nn.Sequential(linear.to("cpu")), peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(a)
    layer.lora_B["default"].weight.data.copy_(b)
    return model.train()


def main() -> None:
    header("lora_linear")
    for rows, width, out in SHAPES:
        x = torch.randn(rows, width).bfloat16().requires_grad_()
        weight, dy = (torch.randn(out, width) / width**0.5).bfloat16(), torch.randn(rows, out).bfloat16()
        a = (torch.randn(RANK, width) / width**0.5).requires_grad_()
        b = (torch.randn(out, RANK) / RANK**0.5).requires_grad_()
        base = FourBit(out, width, "nf4", 64, True)
        packed = (*base.quantize(weight, "w"), None)
        seen = base.dequantize(torch.bfloat16, *packed)

        def eager(w):
            return functional.linear(x, w) + SCALE * functional.linear(
                functional.linear(x, a.to(x.dtype)), b.to(x.dtype)
            )

        def step(y):
            return torch.autograd.grad(y, (x, a, b), dy)

        exact_lora = SCALE * (x.double() @ a.double().t()) @ b.double().t()
        for w, ours in (
            (weight, lora_linear(x, a, b, SCALE, DenseBase, weight)),
            (seen, lora_linear(x, a, b, SCALE, base, *packed)),
        ):
            check(ours, eager(w), x.double() @ w.double().t() + exact_lora, "forward")
        candidates = {
            "ours": lambda: step(lora_linear(x, a, b, SCALE, base, *packed)),
            "ours, bf16 base": lambda: step(lora_linear(x, a, b, SCALE, DenseBase, weight)),
            "eager, bf16 base": lambda: step(eager(weight)),
            "bare bf16 linear": lambda: torch.autograd.grad(functional.linear(x, weight), x, dy),
        }
        if bnb is not None:
            theirs = peer(weight, a.detach(), b.detach())
            trained = [p for p in theirs.parameters() if p.requires_grad]
            candidates["PEFT + bitsandbytes"] = lambda: torch.autograd.grad(theirs(x), (x, *trained), dy)
        flops = (4 * rows * width * out + 6 * rows * RANK * (width + out)) / 1e9
        line(f"nf4, forward + backward [{rows}, {width}] -> {out}", alternate(candidates), gigaflops=flops)


if __name__ == "__main__":
    main()
