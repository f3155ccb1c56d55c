"""x·dequant(W)ᵀ, nf4 at 4096 x 4096: a few rows (decoding) and many (training), forward and input gradient.

Against bitsandbytes (if installed) and torch's bf16 F.linear. Four weights take turns, so that none stays in cache.
bitsandbytes twice for few rows: in training mode, which computes from the packed storage, and in eval mode, where it
repacks its weight once for a decoding kernel of its own (and can no longer save it as it was).
"""

import itertools

import torch
from _bench import alternate, check, header, line
from torch.nn import functional

from inlay.bases import FourBit

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

OUT = WIDTH = 4096
COPIES = 4


def library_linear(dense: torch.Tensor, nested: bool, training: bool):
    """bitsandbytes' own layer; in eval mode it repacks its weight for its decoding kernel."""
    module = bnb.nn.Linear4bit(
        WIDTH, OUT, bias=False, quant_type="nf4", compress_statistics=nested, compute_dtype=torch.bfloat16
    )
    module.weight.data = dense
    return module.to("cpu").train(training)


def library(layers: list, x: torch.Tensor, turn: itertools.count):
    def call():
        with torch.no_grad():
            return layers[next(turn) % COPIES](x)

    return call


def main() -> None:
    header("quantized_linear")
    dense = [(torch.randn(OUT, WIDTH) / WIDTH**0.5).bfloat16() for _ in range(COPIES)]
    for nested in (False, True):
        base = FourBit(OUT, WIDTH, "nf4", 64, nested)
        packed = [(*base.quantize(w, "w"), None) for w in dense]
        weights = [base.dequantize(torch.bfloat16, *p) for p in packed]
        label = "nf4, double-quantized" if nested else "nf4"
        for rows in (1, 8, 16, 64, 512):
            x = torch.randn(rows, WIDTH).bfloat16()
            exact = x.double() @ base.dequantize(torch.float32, *packed[0]).double().t()
            check(base.forward(x, *packed[0]), functional.linear(x, weights[0]), exact, f"forward, {rows} rows")
            turn = itertools.count()

            def ours():
                return base.forward(x, *packed[next(turn) % COPIES])

            def bf16():
                return functional.linear(x, weights[next(turn) % COPIES])

            candidates = {"ours": ours, "bf16 F.linear": bf16}
            if bnb is not None:
                layers = [library_linear(w, nested, training=True) for w in dense]
                candidates["bitsandbytes"] = library(layers, x, turn)
                if rows <= 16:
                    repacked = [library_linear(w, nested, training=False) for w in dense]
                    candidates["bitsandbytes, repacked"] = library(repacked, x, turn)
            flops = 2 * rows * OUT * WIDTH / 1e9
            line(f"{label}, forward, {rows} rows", alternate(candidates), gigaflops=flops)
            if rows < 64:
                continue
            dy = torch.randn(rows, OUT).bfloat16()
            check(base.backward_input(dy, *packed[0]), dy @ weights[0], dy.double() @ weights[0].double(), "backward")

            def ours_backward():
                return base.backward_input(dy, *packed[next(turn) % COPIES])

            def bf16_backward():
                return dy @ weights[next(turn) % COPIES]

            candidates = {"ours": ours_backward, "bf16 matmul": bf16_backward}
            if bnb is not None:
                xs = x.clone().requires_grad_()
                answers = [layer(xs) for layer in layers]
                candidates["bitsandbytes"] = lambda: torch.autograd.grad(
                    answers[next(turn) % COPIES], xs, dy, retain_graph=True
                )
            line(f"{label}, input gradient, {rows} rows", alternate(candidates), gigaflops=flops)


if __name__ == "__main__":
    main()
