"""Chunked linear + cross-entropy against its two matmuls, F.linear + F.cross_entropy, and torch's own chunked op.

python benchmarks/ops/bench_cross_entropy.py [chunk ...]     sweep the rows per chunk
"""

import gc
import sys

import torch
from _bench import alternate, check, header, line
from torch.nn import functional

from inlay.ops import linear_cross_entropy

TOKENS, VOCABULARY, WIDTH = 1024, 49152, 576


def _peak_megabytes(run) -> float:
    """Highest resident memory of `run` above what was there before (Linux)."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

    def read(key):
        with open("/proc/self/status") as file:
            return next(int(text.split()[1]) / 1024 for text in file if text.startswith(key))

    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def main() -> None:
    header("cross_entropy")
    hidden = torch.randn(TOKENS, WIDTH).bfloat16().requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH) / 20).bfloat16()
    labels = torch.randint(0, VOCABULARY, (TOKENS,))

    def step(loss):
        return torch.autograd.grad(loss, hidden)[0]

    def ours(chunk=None):
        return linear_cross_entropy(hidden, weight, labels, chunk=chunk)

    def eager():
        return functional.cross_entropy(functional.linear(hidden, weight).float(), labels)

    def matmuls():
        with torch.no_grad():
            torch.mm(torch.mm(hidden, weight.t()), weight)

    exact = functional.cross_entropy(hidden.double() @ weight.double().t(), labels)
    check(ours(), eager(), exact, "loss")
    check(step(ours()), step(eager()), step(exact), "d_hidden")
    del exact

    candidates = {
        "ours": lambda: step(ours()),
        "its two matmuls": matmuls,
        "F.linear + F.cross_entropy": lambda: step(eager()),
    }
    if hasattr(functional, "linear_cross_entropy"):
        candidates["torch linear_cross_entropy"] = lambda: step(functional.linear_cross_entropy(hidden, weight, labels))
    times = alternate(candidates, seconds=5, least=3)
    flops = 4 * TOKENS * VOCABULARY * WIDTH / 1e9
    line(f"[{TOKENS}, {WIDTH}] x {VOCABULARY}, forward + backward", times, gigaflops=flops)
    for name in ("ours", "F.linear + F.cross_entropy"):
        print(f"  peak memory, {name}: {_peak_megabytes(candidates[name]):.0f} MB")
    for chunk in (int(argument) for argument in sys.argv[1:] if argument.isdigit()):
        line(f"  chunk {chunk}", alternate({"ours": lambda chunk=chunk: step(ours(chunk))}, least=3))
    _trained_head(hidden, weight, labels)


def _trained_head(hidden, weight, labels):
    """The head's gradient too: one chunk of logits, and several whose products are summed in fp32."""
    weight = weight.clone().requires_grad_()
    wide = weight.detach().float().requires_grad_()

    def step(head, chunk=None):
        return torch.autograd.grad(linear_cross_entropy(hidden, head, labels, chunk=chunk), (hidden, head))

    def matmuls():
        with torch.no_grad():
            logits = torch.mm(hidden, weight.t())
            return torch.mm(logits, weight), torch.mm(logits.t(), hidden)

    candidates = {
        "ours": lambda: step(weight),
        "its three matmuls": matmuls,
        "ours, in chunks of 256": lambda: step(weight, 256),
        "ours, head in fp32": lambda: step(wide),
    }
    times = alternate(candidates, seconds=5, least=3)
    flops = 6 * TOKENS * VOCABULARY * WIDTH / 1e9
    line("the same with a trained head", times, gigaflops=flops)
    for name in candidates:
        print(f"  peak memory, {name}: {_peak_megabytes(candidates[name]):.0f} MB")


if __name__ == "__main__":
    main()
