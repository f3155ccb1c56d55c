"""Sums over tokens, one per channel, with bits that do not depend on threads.

The rows are cut into shares, by their number alone on a CPU. Each share is summed in fp32 into a row of its own, and
the shares are added in their order (csrc/cpu/column_sums.h, cuda/column_sums.cuh).
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.ops.submatrix import processors_of

#: Rows of a share on a CPU: additions in a row that fp32 takes well; the sums are then 3% of 16-bit activations.
_CPU_ROWS = 64

#: On a GPU: four blocks for every multiprocessor, which hide each other's loads, of 16 rows at least. Predicted.
_CUDA_ROWS, _CUDA_BLOCKS = 16, 4


def share_sums(x: Tensor, columns: int) -> Tensor:
    """fp32 [shares, columns] of any content: scratch of a sum over the rows of x [..., H]."""
    rows = x.shape[:-1].numel()
    shares = -(-rows // (_CUDA_ROWS if x.is_cuda else _CPU_ROWS))
    if x.is_cuda:
        shares = min(shares, _CUDA_BLOCKS * processors_of(x.device))
    return torch.empty(max(1, shares), columns, dtype=torch.float32, device=x.device)
