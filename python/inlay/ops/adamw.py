"""AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101) over many fp32 tensors in one call.

  p ← p·(1 − lr·λ)        m ← m + (1 − β1)·(g − m)        v ← β2·v + (1 − β2)·g²        g = grad·grad_scale
  p ← p − lr/(1 − β1ᵗ) · m / (sqrt(v)/sqrt(1 − β2ᵗ) + eps)

The formula and the order of operations are torch.optim.AdamW's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inlay._native import module
from inlay.ops._registry import check_device, fail, raw_op

_LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs")


def _check(lists: tuple[list[Tensor], ...], step: int) -> None:
    if len({len(tensors) for tensors in lists}) != 1:
        got = [len(tensors) for tensors in lists]
        fail("adamw_step_", ", ".join(_LISTS), "lists of one length", got, "pass one state per parameter")
    if step < 1:
        fail("adamw_step_", "step", "1 or more", step, "count the first step as 1")
    for tensors in zip(*lists, strict=True):
        for name, tensor in zip(_LISTS, tensors, strict=True):
            if tensor.dtype != torch.float32:
                fail(
                    "adamw_step_", name, "torch.float32", tensor.dtype, "keep trainables and states in fp32", TypeError
                )
            if tensor.shape != tensors[0].shape:
                fail(
                    "adamw_step_", name, f"shape {tuple(tensors[0].shape)}", tuple(tensor.shape), "match the parameter"
                )
            check_device("adamw_step_", name, tensor, "params", tensors[0])


def _native(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    scalars = (lr, beta1, beta2, eps, weight_decay, step, grad_scale)
    states = (params, exp_avgs, exp_avg_sqs)
    if not all(t.is_contiguous() for tensors in states for t in tensors):
        adamw_step_.reference(params, grads, exp_avgs, exp_avg_sqs, *scalars)
        return
    _check((params, grads, exp_avgs, exp_avg_sqs), step)
    grads = [g.contiguous() for g in grads]
    module().adamw_step(*([t.detach().view(-1) for t in ts] for ts in (params, grads, exp_avgs, exp_avg_sqs)), *scalars)
    # Written through raw pointers: tell autograd, so that a graph that saved the old values refuses to use them.
    torch.autograd.graph.increment_version([t for tensors in states for t in tensors])


@raw_op(native=_native, fake=lambda *args: None, mutates=("params", "exp_avgs", "exp_avg_sqs"))
def adamw_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    """One step over every tensor, in place; `step` counts from 1; gradients are multiplied by grad_scale first."""
    _check((params, grads, exp_avgs, exp_avg_sqs), step)
    step_size = lr / (1 - beta1**step)
    root_correction = math.sqrt(1 - beta2**step)
    with torch.no_grad():
        for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            grad = grad if grad_scale == 1.0 else grad * grad_scale
            param.mul_(1 - lr * weight_decay)
            exp_avg.lerp_(grad, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denominator = (exp_avg_sq.sqrt() / root_correction).add_(eps)
            param.addcdiv_(exp_avg, denominator, value=-step_size)
