"""AdamW over all trainables in one multi-tensor kernel: fp32 or bf16 parameters, fp32 or 8-bit states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..ops.adamw import STATE_BLOCK, adamw_8bit_step_, adamw_step_
from ..ops.adamw_bf16 import adamw_8bit_bf16_step_, adamw_bf16_step_
from ..sharding import first_element, is_sharded, local

ROUNDINGS = (None, "residual", "stochastic")

#: Random numbers that are set apart for each parameter in a step: 2^23 parameters of 2^40 elements have their own.
_POSITIONS = 1 << 40


class AdamW(Optimizer):
    """AdamW with decoupled weight decay (Loshchilov & Hutter, 2019), torch.optim.AdamW's formula and state names.

    States are fp32: 8 bytes an element. bf16 parameters, which have no fp32 copy, are stepped in fp32 and rounded as
    `rounding` says; to the nearest bf16 would undo most updates (see :mod:`inlay.ops.adamw_bf16`).

    Args:
        params: fp32 or, with `rounding`, bf16 parameters, or parameter groups; of any shape.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``. Decay acts on trained entries only, since nothing
            else is a parameter; see the delta for what it pulls towards.
        rounding: of bf16 parameters. "residual": an int16 in the state keeps what bf16 has no room for, 2 bytes an
            element, and the trajectory is that of fp32 parameters, bit for bit. "stochastic": up or down at random,
            right in the mean (Gupta et al., 2015, arXiv:1502.02551), no more memory. None: they are refused.
            Whoever writes into a parameter leaves its residual alone, which is at most half of bf16's spacing.
        seed: of the random numbers, an integer of 64 bits. They depend on it, on the step, on a parameter's place
            among the optimizer's parameters and on an element's place in it (in the whole one, where it is sharded).
            A run that goes on from a checkpoint needs the same one.

    Raises:
        ValueError: an option out of range; on loading, residuals where `rounding` keeps none.
        TypeError: a parameter of another dtype, or a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        rounding: str | None = None,
        seed: int = 0,
    ) -> None:
        if not lr >= 0 or not eps >= 0 or not weight_decay >= 0:
            raise ValueError(f"wanted lr, eps, weight_decay >= 0, got {lr}, {eps}, {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: wanted two numbers in [0, 1), got {betas}")
        if rounding not in ROUNDINGS:
            raise ValueError(f'rounding: wanted None, "residual" or "stochastic", got {rounding!r}')
        if not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed: wanted an integer of 64 bits, got {seed}")
        self.rounding, self.seed = rounding, seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    _takes_codes = False
    #: What a copy of the optimizer needs beside torch's.
    _OPTIONS: tuple[str, ...] = ("rounding", "seed")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in self._OPTIONS}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step over every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            scalars = float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"]
            for (step, *_), params in self._by_step(group["params"]).items():
                self._update(params, (*scalars, step, 1.0))
        return loss

    def _by_step(self, params: Iterable[Tensor]) -> dict[tuple, list[Tensor]]:
        """Parameters with a gradient, by the step they are about to take, their device and the dtypes; states made as
        needed."""
        grouped: dict[tuple, list[Tensor]] = {}
        for p in params:
            if p.grad is None:
                continue
            self._check_parameter(p)
            state = self.state[p]
            if not state:
                state.update({"step": torch.tensor(0.0), **self._new_state(p)})
            if self._keeps_residual(p) and "residual" not in state:  # a new state, or one that torch's AdamW saved
                state["residual"] = torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)
            state["step"] += 1
            grouped.setdefault((int(state["step"]), p.device, p.dtype, p.grad.dtype), []).append(p)
        return grouped

    def _check_parameter(self, p: Tensor) -> None:
        wanted = "fp32 parameters" if self.rounding is None else "fp32 or bf16 parameters"
        if p.dtype not in (torch.float32, torch.bfloat16) or p.grad.is_sparse:
            raise TypeError(f"wanted {wanted} with dense gradients, got {p.dtype}, {p.grad.layout}")
        if p.dtype == torch.bfloat16 and self.rounding is None:
            raise TypeError(
                "wanted fp32 parameters with dense gradients, got torch.bfloat16, which would lose small updates to "
                f'rounding; pass {type(self).__name__}(..., rounding="residual") (2 bytes more an element, as exact as '
                'fp32) or rounding="stochastic"'
            )

    def _keeps_residual(self, p: Tensor) -> bool:
        return p.dtype == torch.bfloat16 and self.rounding == "residual"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but for dtypes: torch casts states to their parameter's, which rounds what is beside a bf16 one.

        States that a kernel has no use for here are refused: 8-bit ones, and residuals.
        """
        self._check_states(state_dict)
        super().load_state_dict(state_dict)
        for p, saved in self._saved(state_dict):
            for name, value in saved.items():
                if name != "step" and isinstance(value, Tensor):
                    dtype = torch.float32 if value.is_floating_point() else value.dtype
                    self.state[p][name] = value.to(device=p.device, dtype=dtype)

    def _saved(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Each parameter and what `state_dict` has of it, as torch puts them together: by their order."""
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        return ((p, state_dict["state"].get(key, {})) for p, key in zip(params, keys))

    def _check_states(self, state_dict: dict[str, Any]) -> None:
        for p, state in self._saved(state_dict):
            if "exp_avg_absmax" in state and not self._takes_codes:
                raise ValueError("load_state_dict: wanted fp32 states, got states of 8 bits; load them into AdamW8bit")
            if "residual" in state and not self._keeps_residual(p):
                raise ValueError(
                    f"load_state_dict: wanted states without residuals for a parameter of {p.dtype} and rounding="
                    f'{self.rounding!r}, got one, which is a part of the parameter; load it with rounding="residual" '
                    "and the bf16 parameters it was saved with"
                )

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        def zeros() -> Tensor:
            return torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)

        return {name: zeros() for name in ("exp_avg", "exp_avg_sq")}

    def _update(self, params: list[Tensor], scalars: tuple) -> None:
        """One step over parameters of one dtype on one device that have taken the same number of steps."""
        self._launch(adamw_step_, adamw_bf16_step_, params, ("exp_avg", "exp_avg_sq"), scalars)

    def _launch(
        self, fp32_op: Callable, bf16_op: Callable, params: list[Tensor], names: tuple[str, ...], scalars: tuple
    ) -> None:
        # Each element on its own, so that of a sharded parameter every process takes its part.
        lists = [[local(p.detach()) for p in params], [local(p.grad) for p in params]]
        lists += [[local(self.state[p][name]) for p in params] for name in names]
        if params[0].dtype == torch.float32:
            fp32_op(*lists, *scalars)
        elif self.rounding == "residual":
            bf16_op(*lists, [local(self.state[p]["residual"]) for p in params], [], *scalars, self.seed)
        else:
            bf16_op(*lists, [], self._positions(params), *scalars, self.seed)

    def _positions(self, params: list[Tensor]) -> list[int]:
        """Where each parameter, or this process's part of it, begins in a step's sequence of random numbers."""
        numbers = {p: i for i, p in enumerate(chain.from_iterable(group["params"] for group in self.param_groups))}
        return [numbers[p] * _POSITIONS + first_element(p) for p in params]


class AdamW8bit(AdamW):
    """AdamW with states of 8 bits: 2.03 bytes an element instead of 8 (Dettmers et al., 2022, arXiv:2110.02861).

    Args:
        params, lr, betas, eps, weight_decay, rounding, seed: as in :class:`AdamW`.
        min_8bit_size: parameters with fewer elements keep fp32 states, as in bitsandbytes.

    Raises:
        TypeError: also for a sharded parameter (FSDP2), whose scales would be of one process only.
    """

    _STATES = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
    _OPTIONS = (*AdamW._OPTIONS, "min_8bit_size")
    _takes_codes = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        min_8bit_size: int = 4096,
        *,
        rounding: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, rounding=rounding, seed=seed)
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
            self._launch(adamw_8bit_step_, adamw_8bit_bf16_step_, coded, self._STATES, scalars)
