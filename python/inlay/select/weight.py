"""Selection by weight norm."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_scores(weight: Tensor, side: str) -> Tensor:
    """``‖W[:, c]‖₂`` per input channel (side "in") or ``‖W[c, :]‖₂`` per output channel, fp32, from ``[out, in]``."""
    return torch.linalg.vector_norm(weight.detach().float(), dim=0 if side == "in" else 1)
