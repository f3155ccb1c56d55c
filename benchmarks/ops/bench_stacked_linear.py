"""One training step of linears that share an input, as one node and one at a time: q, k, v and gate, up, bf16.

Frozen, as under S2FT's defaults, and with LoRA of r = 16 on each; dense and double-quantized nf4.
"""

import torch
from _bench import alternate, check, header, line
from torch.nn import functional

from inlay.bases import FourBit
from inlay.bases.linear import base_linear
from inlay.ops import DenseBase
from inlay.ops.lora_linear import lora_linear
from inlay.ops.stacked_linear import Part, stacked_linear

ROWS, RANK, SCALE = 1024, 16, 2.0
#: name: width, outs. SmolLM2-135M's, and Llama-3.2-1B's attention.
STACKS = {"q, k, v": (576, (576, 192, 192)), "gate, up": (576, (1536, 1536)), "q, k, v of 1B": (2048, (2048, 512, 512))}


def make_part(width: int, out: int, quantized: bool, lora: bool) -> Part:
    weight = (torch.randn(out, width) / width**0.5).bfloat16()
    base = FourBit(out, width, "nf4", 64, True) if quantized else DenseBase
    tensors = (*base.quantize(weight, "w"), None) if quantized else (weight, None)
    if not lora:
        return Part(base, tensors)
    factors = torch.randn(RANK, width) / width**0.5, torch.randn(out, RANK) / RANK**0.5
    return Part(base, tensors, *(t.requires_grad_() for t in factors), SCALE)


def alone(x: torch.Tensor, part: Part) -> torch.Tensor:
    if part.a is None:
        return base_linear(x, part.base, *part.tensors)
    return lora_linear(x, part.a, part.b, part.scale, part.base, *part.tensors)


def main() -> None:
    header("stacked_linear")
    for name, (width, outs) in STACKS.items():
        for quantized in (False, True):
            for lora in (False, True):
                parts = [make_part(width, out, quantized, lora) for out in outs]
                x = torch.randn(ROWS, width).bfloat16().requires_grad_()
                dys = [torch.randn(ROWS, out).bfloat16() for out in outs]
                inputs = [x, *(t for part in parts if part.a is not None for t in (part.a, part.b))]

                def together():
                    return torch.autograd.grad(stacked_linear(x, parts), inputs, dys)

                def one_by_one():
                    return torch.autograd.grad([alone(x, part) for part in parts], inputs, dys)

                if not (quantized or lora):
                    wide = x.detach().double().requires_grad_()
                    exact = torch.autograd.grad(
                        [functional.linear(wide, part.tensors[0].double()) for part in parts],
                        wide,
                        [dy.double() for dy in dys],
                    )
                    check(together()[0], one_by_one()[0], exact[0], "gradient of x")
                case = f"{name}, {'nf4' if quantized else 'bf16'}{', LoRA' if lora else ''}"
                line(case, alternate({"together": together, "one by one": one_by_one}))


if __name__ == "__main__":
    main()
