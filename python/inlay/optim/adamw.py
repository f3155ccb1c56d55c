"""AdamW over all trainables in one multi-tensor kernel, with fp32 or 8-bit states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..ops.adamw import STATE_BLOCK, adamw_8bit_step_, adamw_step_
from ..sharding import is_sharded, local


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
            scalars = float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"]
            for (step, _), params in self._by_step(group["params"]).items():
                self._update(params, (*scalars, step, 1.0))
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
                state.update({"step": torch.tensor(0.0), **self._new_state(p)})
            state["step"] += 1
            grouped.setdefault((int(state["step"]), p.device), []).append(p)
        return grouped

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; states of 8 bits are refused, which torch would take for fp32 ones."""
        self._check_states(state_dict)
        super().load_state_dict(state_dict)

    def _check_states(self, state_dict: dict[str, Any]) -> None:
        if any("exp_avg_absmax" in state for state in state_dict["state"].values()):
            raise ValueError("load_state_dict: wanted fp32 states, got states of 8 bits; load them into AdamW8bit")

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")}

    def _update(self, params: list[Tensor], scalars: tuple) -> None:
        """One step over parameters on one device that have taken the same number of steps."""
        # Each element on its own, so that of a sharded parameter every process takes its part.
        states = ([local(self.state[p][name]) for p in params] for name in ("exp_avg", "exp_avg_sq"))
        adamw_step_([local(p.detach()) for p in params], [local(p.grad) for p in params], *states, *scalars)


class AdamW8bit(AdamW):
    """AdamW with states of 8 bits: 2.03 bytes an element instead of 8 (Dettmers et al., 2022, arXiv:2110.02861).

    Args:
        params, lr, betas, eps, weight_decay: as in :class:`AdamW`.
        min_8bit_size: parameters with fewer elements keep fp32 states, as in bitsandbytes.

    Raises:
        TypeError: also for a sharded parameter (FSDP2), whose scales would be of one process only.
    """

    _STATES = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
        self.min_8bit_size = min_8bit_size

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        if p.numel() < self.min_8bit_size:
            return super()._new_state(p)
        if is_sharded(p):
            raise TypeError("AdamW8bit: wanted whole parameters, got a sharded one; use AdamW, or DDP")
        codes = [torch.zeros(p.shape, dtype=torch.uint8, device=p.device) for _ in range(2)]
        blocks = -(-p.numel() // STATE_BLOCK)
        scales = [torch.zeros(blocks, dtype=torch.float32, device=p.device) for _ in range(2)]
        return dict(zip(self._STATES, codes + scales, strict=True))

    def _update(self, params: list[Tensor], scalars: tuple) -> None:
        coded = [p for p in params if "exp_avg_absmax" in self.state[p]]
        plain = [p for p in params if "exp_avg_absmax" not in self.state[p]]
        if plain:
            super()._update(plain, scalars)
        if coded:
            states = ([self.state[p][name] for p in coded] for name in self._STATES)
            adamw_8bit_step_([p.detach() for p in coded], [p.grad for p in coded], *states, *scalars)

    def _check_states(self, state_dict: dict[str, Any]) -> None:
        """Takes states of both kinds."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; what it casts to the parameters' dtype (exactly: codes are small integers) is codes again."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "exp_avg_absmax" in state:
                for name in self._STATES[:2]:
                    state[name] = state[name].to(torch.uint8)
