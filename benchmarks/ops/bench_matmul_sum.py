"""Products of a training step by matmul_sum and in 8 bits, beside torch's; weights take turns, so none stays in cache.

One row each for y = x·Wᵀ and dx = dy·W, then the sums that are one contraction here and several products in torch. Only
where the engine's instruction set is avx512_bf16.
"""

import torch
from _bench import alternate, check, header, line

from inlay import _native
from inlay.ops.int8_products import int8_matmul_sum
from inlay.ops.matmul_sum import ISA, matmul_sum

TURNS, RANK = 6, 16
#: in, out: SmolLM2-135M's linears, and Llama-3.2-1B's o_proj.
LINEARS = [(576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 2048)]
ROWS = (32, 64, 256, 1024)


def in_turn(product, lefts, rights):
    return lambda: [product([left], [right]) for left, right in zip(lefts, rights)]


def plain(lefts, rights):
    return lefts[0] @ rights[0]


def one_product(rows: int, width: int, out: int) -> None:
    xs = [torch.randn(rows, width).bfloat16() for _ in range(TURNS)]
    dys = [torch.randn(rows, out).bfloat16() for _ in range(TURNS)]
    weights = [(torch.randn(out, width) / width**0.5).bfloat16() for _ in range(TURNS)]
    check(matmul_sum(xs[:1], [weights[0].t()]), xs[0] @ weights[0].t(), xs[0].double() @ weights[0].double().t(), "y")
    operations = 2e-9 * TURNS * rows * width * out
    for name, lefts, rights in (("y", xs, [w.t() for w in weights]), ("dx", dys, weights)):
        ways = {"ours": matmul_sum, "torch": plain, "8 bits": int8_matmul_sum}
        times = alternate({way: in_turn(product, lefts, rights) for way, product in ways.items()}, seconds=0.5)
        line(f"{name} of {rows} x {width} x {out}", times, gigaflops=operations)


def one_sum(rows: int, width: int, outs: tuple[int, ...]) -> None:
    """dx of linears of one input with LoRA: Σ dy_i·W_i + dyb·A."""
    dys = [torch.randn(rows, out).bfloat16() for out in (*outs, RANK * len(outs))]
    weights = [torch.randn(t.shape[1], width).bfloat16() for t in dys]

    def one_by_one():
        dx = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:]):
            dx.addmm_(dy, weight)
        return dx

    times = alternate({"ours": lambda: matmul_sum(dys, weights), "torch": one_by_one}, seconds=0.5)
    line(f"dx of {rows} x {width} from {' + '.join(map(str, outs))}, LoRA", times)


def main() -> None:
    header("matmul_sum")
    if _native.module().isa() != ISA:
        print(f"wanted {ISA}, got {_native.module().isa()}: torch's products run here")
        return
    with torch.no_grad():
        for rows in ROWS:
            for width, out in LINEARS:
                one_product(rows, width, out)
        for outs in ((576, 192, 192), (1536, 1536)):
            one_sum(1024, 576, outs)


if __name__ == "__main__":
    main()
