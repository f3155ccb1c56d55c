"""LoftQ: a quantized base and low-rank factors that together come closer to the dense weight.

Source: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023, arXiv:2310.08659,
Algorithm 1: Q_t = quant(W - B_{t-1}·A_{t-1}), then (B_t, A_t) = best rank-r approximation of W - Q_t.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bases import QuantizedLinear
from ..deltas import LowRankDelta


@torch.no_grad()
def loftq(weight: Tensor, module: QuantizedLinear, delta: LowRankDelta, iterations: int, where: str) -> list[float]:
    """Set ``module``'s codes and ``delta``'s factors so that ``Q + s·B·A`` approximates ``weight [out, in]``.

    Stops early where another iteration would not come closer: quantizing does not minimize the residual exactly.

    Returns:
        The Frobenius norm of the residual ``W - Q_t - s·B_t·A_t`` after each iteration; it falls at every one.
    """
    dense, product = weight.float(), torch.zeros_like(weight, dtype=torch.float32)
    norms: list[float] = []
    best = None
    for _ in range(iterations):
        tensors = module.storage.quantize((dense - product).to(weight.dtype), where)
        residual = dense - module.storage.dequantize(torch.float32, *tensors, None)
        a, b = best_low_rank(residual, delta.lora_A.shape[0])
        product = b @ a
        norm = float(torch.linalg.matrix_norm(residual - product))
        if norms and not norm < norms[-1]:
            break
        norms.append(norm)
        best = tensors, a, b
    assert best is not None
    tensors, a, b = best
    for name, tensor in zip(module.storage.names, tensors, strict=True):
        module.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
    delta.lora_A.copy_(a)
    delta.lora_B.copy_(b / delta.scale)
    return norms


def best_low_rank(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``(A [r, in], B [out, r])`` with ``B·A`` the best rank-r approximation; singular values split evenly."""
    u, s, vt = torch.linalg.svd(residual, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root
