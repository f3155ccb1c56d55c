"""A scale and a shift per channel: y = gamma·x + beta, at all channels or at chosen ones.

  backward  dx = gamma·dy    dgamma = Σ dy·x    dbeta = Σ dy

SSF is this after each operation (Lian et al., 2022, arXiv:2210.08823), (IA)³ the scale alone (Liu et al., 2022,
arXiv:2205.05638), LoFiT both at chosen attention heads (Yin et al., 2024, arXiv:2406.01563). Math in fp32 and one
rounding; gamma and beta are fp32. Kept for the backward: gamma, and x (of chosen channels a copy of those) where
dgamma is wanted. One pass over dy and x forms all three gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from inlay._native import module
from inlay.ops._column_sums import share_sums
from inlay.ops._registry import (
    apply,
    as_rows,
    check_device,
    check_floating,
    check_indices,
    check_same,
    compute_dtype,
    fail,
    raw_op,
    without_autocast,
    without_views,
)
from inlay.ops.submatrix import submatrix_gather


def _check(op: str, x: Tensor, x_name: str, numbers: dict[str, Tensor | None], channels: Tensor | None) -> None:
    """Of gamma and beta those that are given: one number per channel, fp32."""
    check_floating(op, x_name, x)
    if channels is not None:
        check_indices(op, channels, x)
    size = x.shape[-1] if channels is None else channels.numel()
    for name, values in numbers.items():
        if values is None:
            continue
        check_device(op, name, values, x_name, x)
        if values.dtype != compute_dtype(x):
            fail(op, name, str(compute_dtype(x)), values.dtype, "trainable values are kept in fp32", TypeError)
        if values.shape != (size,):
            fail(op, name, f"shape {(size,)}", tuple(values.shape), "pass one number per channel, or chosen channel")


def _check_forward(x: Tensor, gamma: Tensor | None, beta: Tensor | None, channels: Tensor | None) -> None:
    if gamma is None and beta is None:
        fail("scale_shift", "gamma, beta", "at least one of them", None, "pass a scale or a shift")
    _check("scale_shift", x, "x", {"gamma": gamma, "beta": beta}, channels)


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().contiguous()


# --- raw op: forward, and dx where nothing else is wanted ------------------------------------------------------------


def _forward_native(x: Tensor, gamma: Tensor | None, beta: Tensor | None, channels: Tensor | None) -> Tensor:
    _check_forward(x, gamma, beta, channels)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    module().scale_shift_forward(as_rows(y), as_rows(x), _plain(gamma), _plain(beta), _plain(channels))
    return y


@raw_op(native=_forward_native, fake=lambda x, gamma, beta, channels: x.new_empty(x.shape))
def scale_shift_forward(x: Tensor, gamma: Tensor | None, beta: Tensor | None, channels: Tensor | None) -> Tensor:
    """x [..., K], gamma, beta fp32 [K] or [s] with channels int64 [s], sorted -> y [..., K]"""
    _check_forward(x, gamma, beta, channels)
    y = (x if channels is None else x.index_select(-1, channels)).to(compute_dtype(x))
    y = y if gamma is None else y * gamma
    y = (y if beta is None else y + beta).to(x.dtype)
    return y.contiguous() if channels is None else x.contiguous().index_copy(-1, channels, y)


# --- raw op: the gradients -------------------------------------------------------------------------------------------


def _check_backward(
    dy: Tensor, x: Tensor | None, gamma: Tensor | None, channels: Tensor | None, needs_dx: bool, needs_dgamma: bool
) -> None:
    op = "scale_shift_backward"
    _check(op, dy, "dy", {"gamma": gamma}, channels)
    if needs_dx and gamma is None:
        fail(op, "gamma", "a scale, since dx is asked for", None, "take dy for dx")
    if not needs_dgamma:
        return
    if x is None:
        fail(op, "x", "the input, since dgamma is asked for", None, "keep it in the forward")
    assert x is not None
    check_same(op, "x", x, "dy", dy)
    wanted = dy.shape if channels is None else (*dy.shape[:-1], channels.numel())
    if x.shape != wanted:
        fail(op, "x", f"shape {tuple(wanted)}", tuple(x.shape), "pass the chosen channels alone")


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    gamma: Tensor | None,
    channels: Tensor | None,
    needs_dx: bool,
    needs_dgamma: bool,
    needs_dbeta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size = dy.shape[-1] if channels is None else channels.shape[0]
    dx = dy.new_empty(dy.shape if needs_dx else 0)
    dgamma, dbeta = (
        dy.new_empty(size if needed else 0, dtype=compute_dtype(dy)) for needed in (needs_dgamma, needs_dbeta)
    )
    return dx, dgamma, dbeta


def _backward_native(
    dy: Tensor,
    x: Tensor | None,
    gamma: Tensor | None,
    channels: Tensor | None,
    needs_dx: bool,
    needs_dgamma: bool,
    needs_dbeta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(dy, x, gamma, channels, needs_dx, needs_dgamma)
    dx, dgamma, dbeta = _backward_fake(dy, x, gamma, channels, needs_dx, needs_dgamma, needs_dbeta)
    rows, channels = as_rows(dy), _plain(channels)
    if needs_dgamma or needs_dbeta:
        module().scale_shift_backward(
            as_rows(dx) if needs_dx else None,
            dgamma if needs_dgamma else None,
            dbeta if needs_dbeta else None,
            share_sums(dy, dgamma.numel() + dbeta.numel()),
            rows,
            as_rows(x) if needs_dgamma else None,
            _plain(gamma),
            channels,
        )
    elif needs_dx:
        module().scale_shift_forward(as_rows(dx), rows, _plain(gamma), None, channels)
    return dx, dgamma, dbeta


@raw_op(native=_backward_native, fake=_backward_fake)
def scale_shift_backward(
    dy: Tensor,
    x: Tensor | None,
    gamma: Tensor | None,
    channels: Tensor | None,
    needs_dx: bool,
    needs_dgamma: bool,
    needs_dbeta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy [..., K], x [..., K] or [..., s] -> dx [..., K], dgamma, dbeta fp32 [K] or [s]; [0] for what is not needed."""
    _check_backward(dy, x, gamma, channels, needs_dx, needs_dgamma)
    dx, dgamma, dbeta = _backward_fake(dy, x, gamma, channels, needs_dx, needs_dgamma, needs_dbeta)
    picked = as_rows(dy if channels is None else dy.index_select(-1, channels)).to(compute_dtype(dy))
    if needs_dx:
        dx = scale_shift_forward.reference(dy, gamma, None, channels)
    if needs_dgamma:
        dgamma = (picked * as_rows(x)).sum(0)
    if needs_dbeta:
        dbeta = picked.sum(0)
    return dx, dgamma, dbeta


# --- autograd ---------------------------------------------------------------------------------------------------------


class _ScaleShift(Function):
    @staticmethod
    @without_views
    @without_autocast
    def forward(ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, channels: Tensor | None) -> Tensor:
        y = scale_shift_forward(x, gamma, beta, channels)
        needs_dx, needs_dgamma, *_ = ctx.needs_input_grad
        kept = None
        if needs_dgamma:
            kept = x if channels is None else submatrix_gather(x, channels, x.dtype)
        ctx.save_for_backward(kept, gamma if needs_dx else None, channels)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, channels = ctx.saved_tensors
        needs_dx, *needs = ctx.needs_input_grad[:3]
        dx, dgamma, dbeta = scale_shift_backward(dy, x, gamma, channels, needs_dx and gamma is not None, *needs)
        if needs_dx and gamma is None:
            dx = dy
        wanted = zip((dx, dgamma, dbeta), (needs_dx, *needs), strict=True)
        return *(grad if needed else None for grad, needed in wanted), None


def scale_shift(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, channels: Tensor | None = None
) -> Tensor:
    """x [..., K] of any float dtype -> gamma·x + beta [..., K] in x's dtype; differentiable in x, gamma and beta.

    gamma, beta: fp32 [K], one of them possibly None (1, 0). channels: int32 or int64 [s], sorted and unique: gamma and
    beta are then [s] and act there; the other channels keep their bits.

    Raises:
        ValueError: neither gamma nor beta, or one of another shape.
        TypeError: gamma or beta in another dtype than fp32, channels that are no integers.
        IndexError: a channel that x has not.
    """
    if channels is not None and channels.dtype == torch.int32:
        channels = channels.long()
    return apply(_ScaleShift, x, gamma, beta, channels)
