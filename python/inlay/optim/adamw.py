"""AdamW over all trainables in one multi-tensor kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..ops.adamw import adamw_step_
from ..sharding import local


class AdamW(Optimizer):
    """AdamW with decoupled weight decay (Loshchilov & Hutter, 2019), torch.optim.AdamW's formula and state names.

    Args:
        params: fp32 parameters or parameter groups.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``. Decay acts on trained entries only, since nothing
            else is a parameter; see the delta for what it pulls towards.

    Raises:
        ValueError: an option out of range. TypeError: a parameter that is not fp32, or a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if not lr >= 0 or not eps >= 0 or not weight_decay >= 0:
            raise ValueError(f"wanted lr, eps, weight_decay >= 0, got {lr}, {eps}, {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: wanted two numbers in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step over every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for (step, _), params in self._by_step(group["params"]).items():
                states = [self.state[p] for p in params]
                adamw_step_(  # each element on its own, so that of a sharded parameter every process takes its part
                    [local(p.detach()) for p in params],
                    [local(p.grad) for p in params],
                    [local(state["exp_avg"]) for state in states],
                    [local(state["exp_avg_sq"]) for state in states],
                    float(group["lr"]),
                    *group["betas"],
                    group["eps"],
                    group["weight_decay"],
                    step,
                    1.0,
                )
        return loss

    def _by_step(self, params: Iterable[Tensor]) -> dict[tuple[int, torch.device], list[Tensor]]:
        """Parameters with a gradient, by the step they are about to take and their device; states made as needed."""
        grouped: dict[tuple[int, torch.device], list[Tensor]] = {}
        for p in params:
            if p.grad is None:
                continue
            if p.dtype != torch.float32 or p.grad.is_sparse:
                raise TypeError(f"wanted fp32 parameters with dense gradients, got {p.dtype}, {p.grad.layout}")
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["step"] += 1
            grouped.setdefault((int(state["step"]), p.device), []).append(p)
        return grouped
