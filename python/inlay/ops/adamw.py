"""AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101) over many fp32 tensors in one call.

  p ← p·(1 − lr·λ)        m ← m + (1 − β1)·(g − m)        v ← β2·v + (1 − β2)·g²        g = grad·grad_scale
  p ← p − lr/(1 − β1ᵗ) · m / (sqrt(v)/sqrt(1 − β2ᵗ) + eps)

The formula and the order of operations are torch.optim.AdamW's. With states of 8 bits (Dettmers et al., 2022,
arXiv:2110.02861) m and v are codes of the dynamic maps, signed and unsigned, over blocks of 256 with one fp32 scale:
the step is taken with the new fp32 states, which are then coded. bitsandbytes' 8-bit optimizers store the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from inlay._native import module
from inlay.ops._registry import check_device, fail, raw_op
from inlay.ops.quantize_blockwise import dynamic_map

#: Elements that share a scale, as in bitsandbytes' optimizers.
STATE_BLOCK = 256

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs")
SCALES = ("exp_avg_absmaxes", "exp_avg_sq_absmaxes")


def _check_tensor(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], param: Tensor
) -> None:
    if tensor.dtype != dtype:
        fail(op, name, str(dtype), tensor.dtype, "keep trainables in fp32 and states as they were made", TypeError)
    if tensor.shape != shape:
        fail(op, name, f"shape {tuple(shape)}", tuple(tensor.shape), "match the parameter")
    check_device(op, name, tensor, "params", param)


def check(op: str, lists: dict[str, list[Tensor]], step: int, dtypes: dict[str, torch.dtype] | None = None) -> None:
    """Lists that fit together, of fp32 where `dtypes` names no other; codes are uint8."""
    if len({len(tensors) for tensors in lists.values()}) != 1:
        got = [len(tensors) for tensors in lists.values()]
        fail(op, ", ".join(lists), "lists of one length", got, "pass one state per parameter")
    if step < 1:
        fail(op, "step", "1 or more", step, "count the first step as 1")
    wanted = dict.fromkeys(lists, torch.float32) | (dtypes or {})
    if SCALES[0] in lists:
        wanted |= dict.fromkeys(LISTS[2:], torch.uint8)
    for i, param in enumerate(lists["params"]):
        for name, tensors in lists.items():
            shape = (-(-param.numel() // STATE_BLOCK),) if name in SCALES else param.shape
            _check_tensor(op, name, tensors[i], wanted[name], shape, param)


def flat(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().view(-1) for t in tensors]


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
    written = [*params, *exp_avgs, *exp_avg_sqs]
    if not all(t.is_contiguous() for t in written):
        adamw_step_.reference(params, grads, exp_avgs, exp_avg_sqs, *scalars)
        return
    check("adamw_step_", dict(zip(LISTS, (params, grads, exp_avgs, exp_avg_sqs), strict=True)), step)
    grads = [g.contiguous() for g in grads]
    module().adamw_step(*map(flat, (params, grads, exp_avgs, exp_avg_sqs)), *scalars)
    # Written through raw pointers: tell autograd, so that a graph that saved the old values refuses to use them.
    torch.autograd.graph.increment_version(written)


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
    check("adamw_step_", dict(zip(LISTS, (params, grads, exp_avgs, exp_avg_sqs), strict=True)), step)
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


# --- states of 8 bits -------------------------------------------------------------------------------------------------


def encode_state(state: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 of any shape -> codes uint8 of that shape, scales fp32 [ceil(numel/256)].

    The nearest level; but without a sign (v, by whose root a step is divided) what is positive never becomes 0.
    """
    flat = state.detach().reshape(-1)
    blocks = pad(flat, (0, -flat.numel() % STATE_BLOCK)).view(-1, STATE_BLOCK)
    absmax = blocks.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(dim=1)
    unit = torch.where(absmax[:, None] >= 1.2e-38, blocks / absmax[:, None], 0.0).nan_to_num(nan=0.0)
    table = dynamic_map(state.device, signed).to(flat.dtype)
    codes = torch.bucketize(unit, (table[:-1] + table[1:]) / 2)
    if not signed:
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes)
    return codes.reshape(-1)[: flat.numel()].to(torch.uint8).view(state.shape), absmax


def decode_state(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """fp32 in the shape of codes: map[code]·absmax of its block."""
    scales = absmax.repeat_interleave(STATE_BLOCK)[: codes.numel()].view(codes.shape)
    return dynamic_map(codes.device, signed)[codes.long()].to(absmax.dtype) * scales


def _8bit_native(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_absmaxes: list[Tensor],
    exp_avg_sq_absmaxes: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    scalars = (lr, beta1, beta2, eps, weight_decay, step, grad_scale)
    lists = (params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes)
    written = [t for tensors in (params, *lists[2:]) for t in tensors]
    if not all(t.is_contiguous() for t in written):
        adamw_8bit_step_.reference(*lists, *scalars)
        return
    check("adamw_8bit_step_", dict(zip(LISTS + SCALES, lists, strict=True)), step)
    if not params:
        return
    device = params[0].device
    lists = (params, [g.contiguous() for g in grads], *lists[2:])
    module().adamw_8bit_step(*map(flat, lists), dynamic_map(device), dynamic_map(device, False), *scalars)
    torch.autograd.graph.increment_version(written)


_8BIT_MUTATES = ("params", *LISTS[2:], *SCALES)


@raw_op(native=_8bit_native, fake=lambda *args: None, mutates=_8BIT_MUTATES)
def adamw_8bit_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_absmaxes: list[Tensor],
    exp_avg_sq_absmaxes: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    """The same step with exp_avgs and exp_avg_sqs as uint8 codes, and their scales fp32 [ceil(numel/256)]."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes)
    check("adamw_8bit_step_", dict(zip(LISTS + SCALES, lists, strict=True)), step)
    for param, grad, m_codes, v_codes, m_scale, v_scale in zip(*lists, strict=True):
        states = decode_state(m_codes, m_scale, True), decode_state(v_codes, v_scale, False)
        scalars = (lr, beta1, beta2, eps, weight_decay, step, grad_scale)
        adamw_step_.reference([param], [grad], [states[0]], [states[1]], *scalars)
        with torch.no_grad():
            for state, codes, scale, signed in zip(states, (m_codes, v_codes), (m_scale, v_scale), (True, False)):
                new_codes, new_scale = encode_state(state, signed)
                codes.copy_(new_codes)
                scale.copy_(new_scale)
