"""What no method can save: the products of a step with every weight frozen, at the machine's own rate of products."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from _measure import now

#: Products of an attention's forward (scores, outputs) and of its backward (dV, dP, dQ, dK), each once.
ATTENTION_PRODUCTS = 6


def floor(
    shape: dict[str, Any], lengths: Sequence[int], supervised: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, float], float]:
    """Seconds of each kind of product of one step, forward and dX, and the linears' FLOPs per second.

    Linears and the head are timed. Attention's FLOPs, of the keys that causal tokens of samples of ``lengths`` see,
    count at the rate of the linears: how long torch takes for them is no bound. The head runs on ``supervised`` tokens.
    """
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, kv = shape["num_attention_heads"], shape["num_key_value_heads"]
    width, tokens = shape.get("head_dim", hidden // heads), sum(lengths)
    sizes = [(hidden, heads * width), (hidden, kv * width), (hidden, kv * width), (heads * width, hidden)]
    sizes += [(hidden, inner), (hidden, inner), (inner, hidden)]

    def product(k: int, n: int, m: int) -> float:
        x, w, dy = (torch.randn(*dims, dtype=dtype, device=device) for dims in ((m, k), (n, k), (m, n)))
        return _timed(lambda: (x @ w.t(), dy @ w), device)

    linears = layers * sum(product(k, n, tokens) for k, n in sizes)
    rate = layers * sum(4 * k * n * tokens for k, n in sizes) / linears
    chunk = min(supervised, 1024)
    loss = product(hidden, shape["vocab_size"], chunk) * supervised / chunk
    attention = layers * attention_flops(lengths, heads, width) / rate
    return {"linears": linears, "attention": attention, "loss_products": loss}, rate


def attention_flops(lengths: Sequence[int], heads: int, width: int) -> float:
    """Of one block's causal attention, forward and backward, over samples of ``lengths``."""
    seen = sum(length * (length + 1) / 2 for length in lengths)
    return ATTENTION_PRODUCTS * 2 * seen * heads * width


def _timed(run: Any, device: str) -> float:
    run()
    times = []
    for _ in range(5):
        start = now(device)
        run()
        times.append(now(device) - start)
    return statistics.median(times)
