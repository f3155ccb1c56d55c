"""Each CUDA kernel at Llama-3-8B's shapes: microseconds, bytes, and the share of what memory allows.

    python benchmarks/gpu/ops.py [--seconds 90] [--json ops.json]

The floor of a memory-bound op is its bytes over the bandwidth of a large copy, measured first. Inputs rotate through
several sets, so that nothing is found in L2 that would not be there in a model. Calls are captured in a CUDA graph:
what is timed is the GPU. Most important cases first; those that do not fit the time are named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from inlay.ops import quantize_blockwise as four_bit
from inlay.ops._registry import RAW_OPS
from inlay.ops.quantized_stack import PackedStack, stack_forward

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import _measure
import libraries

LINEARS = {"gate": (14336, 4096), "o": (4096, 4096), "k": (1024, 4096), "down": (4096, 14336)}  # [out, in]
BF16 = torch.bfloat16
DEVICE = "cuda"
COPY = 1 << 30  # bytes: far beyond any L2
SETS = 4  # 8.7 to 30 MB of packed weights each: one set would stay in a 60 MB L2
LEAST = 50  # timed replays


@dataclass
class Case:
    """`runs`: the same call on each set of inputs. `peers`: the same work done otherwise.

    `called`: peers that are timed as they are called, with their Python, and ours likewise beside them.
    """

    name: str
    runs: list[Callable[[], Any]]
    gigabytes: float = 0.0
    gigaflops: float = 0.0
    peers: dict[str, list[Callable[[], Any]]] = field(default_factory=dict)
    called: dict[str, list[Callable[[], Any]]] = field(default_factory=dict)


def called_microseconds(runs: list[Callable[[], Any]]) -> float:
    """Median time of one call among many in a row, whatever limits them, Python or GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(8):
        begin.record()
        for _ in range(5):
            for run in runs:
                run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (5 * len(runs)))
    return statistics.median(times[1:])


def microseconds(runs: list[Callable[[], Any]]) -> float:
    """Median time of one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times, started = [], time.perf_counter()
    while len(times) < LEAST and (len(times) < 5 or time.perf_counter() - started < 3):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(runs))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s, reads and writes counted. Not in a graph: there a copy is a node of its own kind, a third slower."""
    source, target = (torch.empty(COPY, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * COPY / called_microseconds([lambda: target.copy_(source)]) / 1e3


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def op(name: str, *args: Any) -> Callable[[], Any]:
    return lambda: RAW_OPS[name](*args)


def per_set(make: Callable[[], Callable[[], Any]], sets: int = SETS) -> list[Callable[[], Any]]:
    return [make() for _ in range(sets)]


def nf4(out: int, width: int) -> tuple:
    packed, absmax = four_bit.quantize_4bit(randn(out, width), "nf4", 64)
    codes, absmax2, offset = four_bit.quantize_absmax(absmax)
    return packed, absmax2, codes, offset


def dequantize_cases() -> Iterator[Case]:
    for name, (out, width) in LINEARS.items():
        dense = torch.empty(out, width, device=DEVICE, dtype=BF16)
        runs = [op("dequantize_4bit_", dense, *nf4(out, width), "nf4", 64, width, 0, 0) for _ in range(SETS)]
        called = libraries.dequantize([randn(out, width) for _ in range(SETS)])
        yield Case(f"dequantize {name}", runs, out * width * (0.5159 + 2) / 1e9, called=called)


def decode_cases() -> Iterator[Case]:
    for tokens in (1, 16, 64, 4, 32):
        for name, (out, width) in LINEARS.items():
            storages, x = [nf4(out, width) for _ in range(SETS)], randn(tokens, width)
            dense = torch.empty(out, width, device=DEVICE, dtype=BF16)

            def unfused(storage: tuple, x: torch.Tensor = x, dense: torch.Tensor = dense) -> torch.Tensor:
                four_bit.dequantize_4bit_(dense, *storage, "nf4", 64, dense.shape[1], 0, 0)
                return x @ dense.t()

            def fused(storage: tuple, x: torch.Tensor = x, out: int = out) -> torch.Tensor:
                return RAW_OPS["quantized_linear_small"](x, *storage, None, "nf4", 64, out)

            wanted, got = unfused(storages[0]).float(), fused(storages[0]).float()
            error = float((got - wanted).norm() / wanted.norm())
            if not error < 6e-3:
                raise SystemExit(f"quantized_linear {name}, {tokens} rows: relative error {error:.1e}; not timing it")
            moved = out * width * 0.5159 + 2 * tokens * (out + width)
            peers = {"dequantize + matmul": [lambda s=s, f=unfused: f(s) for s in storages]}
            called = libraries.linear([randn(out, width) for _ in range(SETS)], x)
            runs = [lambda s=s, f=fused: f(s) for s in storages]
            yield Case(f"quantized_linear {name} M={tokens}", runs, moved / 1e9, peers=peers, called=called)


def lora_cases(rank: int = 16) -> Iterator[Case]:
    """A decoded linear with LoRA: one op of two launches, against the product and then the branch."""
    for tokens in (1, 16):
        for name in ("gate", "o"):
            out, width = LINEARS[name]
            storages, x = [nf4(out, width) for _ in range(SETS)], randn(tokens, width)
            a, b = randn(rank, width, dtype=torch.float32), randn(out, rank, dtype=torch.float32) / 64

            def fused(storage: tuple, x: torch.Tensor = x, factors: tuple = (a, b), out: int = out) -> torch.Tensor:
                return RAW_OPS["quantized_lora_linear_small"](x, *storage, None, *factors, 2.0, "nf4", 64, out)

            def apart(storage: tuple, x: torch.Tensor = x, factors: tuple = (a, b), out: int = out) -> torch.Tensor:
                y = RAW_OPS["quantized_linear_small"](x, *storage, None, "nf4", 64, out)
                RAW_OPS["lora_add_"](y, x, *factors, 2.0)
                return y

            wanted, got = apart(storages[0]).float(), fused(storages[0]).float()
            error = float((got - wanted).norm() / wanted.norm())
            if not error < 6e-3:
                raise SystemExit(f"quantized_lora_linear {name}, {tokens} rows: error {error:.1e}; not timing it")
            moved = out * width * 0.5159 + 2 * tokens * (out + width) + 4 * rank * (out + width)
            peers = {"product, then branch": [lambda s=s, f=apart: f(s) for s in storages]}
            runs = [lambda s=s, f=fused: f(s) for s in storages]
            yield Case(f"quantized_lora_linear {name} M={tokens} r={rank}", runs, moved / 1e9, peers=peers)


def block_cases(tokens: int = 8192, hidden: int = 4096, inner: int = 14336) -> Iterator[Case]:
    chosen = torch.arange(0, inner, 33, device=DEVICE)
    act, row = 2 * tokens * inner / 1e9, 2 * tokens * hidden / 1e9
    weight, rstd = randn(hidden), torch.rand(tokens, device=DEVICE)

    def backward() -> Callable[[], Any]:
        return op("swiglu_backward", *(randn(tokens, inner) for _ in range(3)), "silu", chosen)

    yield Case("swiglu_backward with h_sel", per_set(backward, 2), 5 * act)
    gates, ups = ([randn(tokens, inner) for _ in range(2)] for _ in range(2))
    forward = [op("swiglu_forward", gate, up, "silu") for gate, up in zip(gates, ups)]
    yield Case("swiglu_forward", forward, 3 * act, called=libraries.swiglu(gates, ups))
    yield Case(
        "rms_norm_forward", per_set(lambda: op("rms_norm_forward", randn(tokens, hidden), weight, 1e-5, 0.0)), 2 * row
    )
    for trained in (False, True):
        norm_back = per_set(
            lambda: op(
                "rms_norm_backward", *(randn(tokens, hidden) for _ in range(2)), weight, rstd, 0.0, True, trained
            )
        )
        yield Case("rms_norm_backward" + " with dweight" * trained, norm_back, 3 * row)
    gamma, beta = (randn(hidden, dtype=torch.float32) for _ in range(2))
    scaled = per_set(lambda: op("scale_shift_forward", randn(tokens, hidden), gamma, beta, None))
    yield Case("scale_shift_forward", scaled, 2 * row)
    scaled_back = per_set(
        lambda: op("scale_shift_backward", *(randn(tokens, hidden) for _ in range(2)), gamma, None, True, True, True)
    )
    yield Case("scale_shift_backward", scaled_back, 3 * row)
    logits, labels = randn(1024, 128256), torch.randint(0, 128256, (1024,), device=DEVICE)
    yield Case(
        "cross_entropy_chunk with gradient",
        [op("cross_entropy_chunk_", logits, labels, 1.0, True)],
        4 * logits.numel() / 1e9,
    )
    q, k = (randn(1, tokens, heads, 128).transpose(1, 2) for heads in (32, 8))
    cos, sin = randn(1, tokens, 128), randn(1, tokens, 128)
    yield Case("rope q and k", [op("rope_rotate", q, k, cos, sin, False)], 2 * 2 * (q.numel() + k.numel()) / 1e9)
    y, acc = randn(tokens, hidden), randn(tokens, hidden, dtype=torch.float32)
    yield Case("submatrix_add", [op("submatrix_add", y, acc)], 4 * row)
    h, few = randn(tokens, inner), chosen[:430]
    yield Case("submatrix_gather", [op("submatrix_gather", h, few, BF16)], 2 * 2 * tokens * few.numel() / 1e9)
    yield from grad_cases(tokens, hidden, inner)


def grad_cases(tokens: int, hidden: int, inner: int) -> Iterator[Case]:
    """What LoRA and S2FT ask for: the kernel up to 64 columns, torch.mm above; torch.mm beside both."""
    for columns, chosen in ((inner, 16), (hidden, 16), (hidden, 64), (hidden, 430)):

        def library(dy: torch.Tensor, x: torch.Tensor) -> Callable[[], Any]:
            return lambda: torch.mm(dy.t(), x, out_dtype=torch.float32)

        inputs = [(randn(tokens, columns), randn(tokens, chosen)) for _ in range(2)]
        runs = [op("submatrix_grad", dy, x) for dy, x in inputs]
        peers = {"torch.mm, fp32 out": [library(dy, x) for dy, x in inputs]}
        read = 2 * tokens * (columns + chosen) / 1e9
        yield Case(f"submatrix_grad [{columns}, {chosen}]", runs, read, 2 * tokens * columns * chosen / 1e9, peers)


def lora_backward_cases(tokens: int = 8192, rank: int = 16) -> Iterator[Case]:
    """dy·sB and dyᵀ·xa: one pass over dy, against the two ops that it replaces."""
    for columns in (LINEARS["gate"][0], LINEARS["o"][0]):

        def apart(dy: torch.Tensor, xa: torch.Tensor, sb: torch.Tensor) -> Callable[[], Any]:
            return lambda: (dy.mm(sb), RAW_OPS["submatrix_grad"](dy, xa))

        inputs = [(randn(tokens, columns), randn(tokens, rank), randn(columns, rank)) for _ in range(2)]
        moved = 2 * tokens * columns + 8 * rank * (tokens + columns)
        runs = [op("lora_backward", *three) for three in inputs]
        peers = {"two ops": [apart(*three) for three in inputs]}
        yield Case(f"lora_backward [{columns}, {rank}]", runs, moved / 1e9, peers=peers)


def stack_cases(tokens: int = 8192, rank: int = 16) -> Iterator[Case]:
    """gate and up with LoRA as one product of K + r, against one after the other with the branch summed onto each."""
    (out, width), weights = LINEARS["gate"], []
    for _ in range(2):
        packed, absmaxes, codes, offsets = map(list, zip(nf4(out, width), nf4(out, width)))
        weights.append(PackedStack(packed, absmaxes, codes, offsets, [out, out], width, "nf4", 64))
    x, left, right = randn(tokens, width), randn(tokens, rank), randn(2 * out, rank)

    def together(stack: PackedStack) -> list[torch.Tensor]:
        return stack_forward(x, stack, [None, None], left, right)

    def apart(stack: PackedStack) -> list[torch.Tensor]:
        result = []
        for i in range(2):
            dense = stack._replace(
                **{k: getattr(stack, k)[i : i + 1] for k in ("packed", "absmaxes", "codes", "offsets")}
            )
            panel = dense._replace(rows=[out]).dequantize(x)
            y = left.mm(right[i * out : (i + 1) * out].t())
            result.append(y.addmm_(x, panel.t()))
        return result

    runs = [lambda s=s: together(s) for s in weights]
    peers = {"one after the other": [lambda s=s: apart(s) for s in weights]}
    yield Case(f"gate and up, r={rank}, as one product", runs, 0, 4 * tokens * out * width / 1e9, peers)


def adamw_cases() -> Iterator[Case]:
    shapes = [(4096, 430)] * 32 + [(4096, 123)] * 32  # S2FT at 3%: o_proj and down_proj of every layer
    lists = [[torch.rand(shape, device=DEVICE) for shape in shapes] for _ in range(4)]
    count = sum(t.numel() for t in lists[0])
    copies = [p.clone().requires_grad_() for p in lists[0]]
    for copy in copies:
        copy.grad = torch.rand_like(copy)
    peer = torch.optim.AdamW(copies, lr=1e-4, fused=True, capturable=True)
    scalars = (1e-4, 0.9, 0.999, 1e-8, 0.0, 1, 1.0)
    step = op("adamw_step_", *lists, *scalars)
    yield Case(f"adamw_step {count / 1e6:.0f}M", [step], 7 * 4 * count / 1e9, peers={"torch fused": [peer.step]})
    codes = [[torch.zeros_like(p, dtype=torch.uint8) for p in lists[0]] for _ in range(2)]
    scales = [[torch.zeros(-(-p.numel() // 256), device=DEVICE) for p in lists[0]] for _ in range(2)]
    step = op("adamw_8bit_step_", *lists[:2], *codes, *scales, *scalars)
    yield Case(f"adamw_8bit_step {count / 1e6:.0f}M", [step], 16.0625 * count / 1e9)
    yield from adamw_bf16_cases(lists[0], lists[2:], codes + scales, scalars)


def adamw_bf16_cases(values: list, fp32: list[list], coded: list[list], scalars: tuple) -> Iterator[Case]:
    """bf16 parameters and gradients; the peer keeps states of bf16 and loses small updates."""
    params, grads, copies = ([t.to(BF16) for t in values] for _ in range(3))
    residuals = [torch.zeros_like(t, dtype=torch.int16) for t in values]
    positions = [i << 40 for i in range(len(values))]
    count = sum(t.numel() for t in values)
    for copy, grad in zip(copies, grads):
        copy.requires_grad_().grad = grad
    peer = torch.optim.AdamW(copies, lr=1e-4, fused=True, capturable=True)
    for name, states, rounding, each in (
        ("adamw_bf16_step, residual", fp32, (residuals, []), 26),
        ("adamw_bf16_step, stochastic", fp32, ([], positions), 22),
        ("adamw_8bit_bf16_step, stochastic", coded, ([], positions), 10.0625),
    ):
        kernel = "adamw_bf16_step_" if states is fp32 else "adamw_8bit_bf16_step_"
        step = op(kernel, params, grads, *states, *rounding, *scalars, 0)
        peers = {"torch fused, bf16 states": [peer.step]} if states is fp32 else {}
        yield Case(f"{name} {count / 1e6:.0f}M", [step], each * count / 1e9, peers=peers)


def library_cases() -> Iterator[Case]:
    """Questions about cuBLAS that decide designs: do sixteen more columns, or a row stride, cost anything?"""
    for columns in (4096, 4112, 4160):
        x, w = randn(4096, columns), randn(14336, columns)
        yield Case(f"torch.mm 4096x{columns}x14336", [lambda x=x, w=w: x @ w.t()], 0, 2 * 4096 * 14336 * columns / 1e9)
    x, w = randn(4096, 4160)[:, :4096], randn(14336, 4160)[:, :4096]
    yield Case("torch.mm 4096x4096x14336, rows 4160 apart", [lambda: x @ w.t()], 0, 2 * 4096 * 14336 * 4096 / 1e9)


def panel_cases() -> Iterator[Case]:
    """Does a dequantized panel that fits L2 save its way through memory, as on a CPU? The whole weight is what runs."""
    out, width = LINEARS["gate"]
    storages = [nf4(out, width) for _ in range(SETS)]
    dense = torch.empty(out, width, device=DEVICE, dtype=BF16)

    def product(storage: tuple, x: torch.Tensor, y: torch.Tensor, height: int) -> None:
        for row in range(0, out, height):
            panel = dense[:height][: out - row]
            four_bit.dequantize_4bit_(panel, *storage, "nf4", 64, width, row, 0)
            torch.mm(x, panel.t(), out=y[:, row : row + height])

    for tokens in (1024, 256, 2048):
        x, y = randn(tokens, width), randn(tokens, out)
        peers = {
            f"panels of {rows * width >> 19} MiB": [lambda s=s, x=x, y=y, h=rows: product(s, x, y, h) for s in storages]
            for rows in (1024, 2048, 4096)
        }
        runs = [lambda s=s, x=x, y=y: product(s, x, y, out) for s in storages]
        yield Case(f"dequantize + matmul gate M={tokens}", runs, 0, 2 * tokens * out * width / 1e9, peers)


def all_cases() -> Iterator[Case]:
    decode = decode_cases()
    yield from dequantize_cases()
    yield from (next(decode) for _ in range(12))  # 1, 16 and 64 rows
    yield from block_cases()
    yield from adamw_cases()
    yield from lora_backward_cases()
    yield from stack_cases()
    yield from lora_cases()
    yield from library_cases()
    yield from panel_cases()
    yield from decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    started = time.monotonic()
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth:.0f} GB/s\n")
    rows: list[dict[str, Any]] = []
    for case in all_cases():
        taken = microseconds(case.runs)
        row = {"case": case.name, "us": taken, "gigabytes": case.gigabytes, "gigaflops": case.gigaflops}
        text = f"{case.name:44} {taken:9.1f} us"
        if case.gigabytes:
            row["of_copy_bandwidth"] = case.gigabytes * 1e6 / taken / bandwidth
            text += f"  {row['of_copy_bandwidth']:6.1%} of copy"
        if case.gigaflops:
            text += f"  {case.gigaflops * 1e3 / taken:6.0f} TFLOP/s"
        for name, runs in case.peers.items():
            row[name] = microseconds(runs)
            text += f"  {row[name] / taken:5.2f}x {name}"
        if case.called:
            row["called"] = {"ours": called_microseconds(case.runs)}
            for name, runs in case.called.items():
                try:
                    row["called"][name] = called_microseconds(runs)
                except Exception as error:  # their call, in a version that this was not written for
                    print(f"{name}: not compared: {type(error).__name__}: {str(error)[:200]}")
                    continue
                text += f"  {row['called'][name] / row['called']['ours']:5.2f}x {name}, called"
        print(text, flush=True)
        rows.append(row)
        if args.json:  # after every case: what was measured stays, whatever comes
            result = {"machine": _measure.provenance(DEVICE), "copy_gb_per_s": bandwidth, "rows": rows}
            args.json.write_text(json.dumps(result, indent=2))
        if time.monotonic() - started > args.seconds:
            print(f"stopped after {args.seconds:.0f} s; the remaining cases were not run")
            return


if __name__ == "__main__":
    main()
