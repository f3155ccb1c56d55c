"""AdamW on bfloat16 parameters, without an fp32 copy of them and without losing updates to rounding.

A step is taken in fp32, by inlay.ops.adamw's formula, from the parameter widened to fp32: its master. Near 0.02 bf16
numbers are 1.2e-4 apart, so that rounding an update of 1e-5 to the nearest one mostly undoes it. Instead

residual    bits(master) = (bits(param) << 16) + residual: an int16 beside each parameter keeps the rest. The trajectory
            is bit for bit that of fp32 parameters. The parameter is the bf16 nearest to its master, of two the one
            further from 0 (and not the even one, which would stand for one fp32 number more than 16 bits tell apart).
at random   the master is rounded up or down, by chance, so that its mean is kept (stochastic rounding: Gupta et al.,
            2015, arXiv:1502.02551; in training with bf16 weights: Zamirai et al., 2020, arXiv:2010.06192). The chance
            is a function of the seed, the step and the parameter's position alone: 16 bits of Philox4x32-7 (Salmon
            et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay._native import module
from inlay.ops._registry import fail, raw_op
from inlay.ops.adamw import LISTS, SCALES, adamw_8bit_step_, adamw_step_, check, flat
from inlay.ops.quantize_blockwise import dynamic_map

_WORD = 0xFFFFFFFF
_NAN = 0x7FC00000  # of every NaN: adding to another's bits could carry into the sign
#: Random numbers of 16 bits that one call of Philox gives to neighbours.
DRAWN = 8

_BF16 = {"params": torch.bfloat16, "residuals": torch.int16}


def _check(op: str, lists: dict[str, list[Tensor]], positions: list[int], step: int, seed: int, each: int) -> None:
    """`lists` with the residuals, which may be empty; positions are multiples of `each`."""
    residuals, params = lists["residuals"], lists["params"]
    if len(positions) != (0 if residuals else len(params)):
        got = f"{len(residuals)} residuals, {len(positions)} positions, {len(params)} parameters"
        fail(op, "residuals, positions", "one of the two per parameter, the other empty", got, "choose a rounding")
    for position in positions:
        if position < 0 or position % each:
            fail(op, "positions", f"multiples of {each} from 0 on", position, "begin each tensor at one")
    if not -(1 << 63) <= seed < 1 << 63:
        fail(op, "seed", "an integer of 64 bits", seed, "choose a smaller one")
    dtypes = dict(_BF16)
    if lists["grads"]:
        dtypes["grads"] = torch.bfloat16 if lists["grads"][0].dtype == torch.bfloat16 else torch.float32
    check(op, {name: list_ for name, list_ in lists.items() if list_ or name != "residuals"}, step, dtypes)


# --- the two roundings, in plain torch --------------------------------------------------------------------------------


def _bits(x: Tensor) -> Tensor:
    """The 32 bits of fp32 numbers, as int64; of every NaN the same ones."""
    return torch.where(x.isnan(), _NAN, x.view(torch.int32).long() & _WORD)


def _upper(bits: Tensor) -> Tensor:
    """The bf16 that bits 16 to 31 are."""
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)  # keeps the lowest 16


def join_residual(param: Tensor, residual: Tensor) -> Tensor:
    """The fp32 masters of bf16 parameters and their int16 residuals."""
    bits = (param.detach().contiguous().view(torch.int16).long() << 16) + residual.long()
    return bits.to(torch.int32).view(torch.float32)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> the nearest bf16 and the int16 residual that is lacking."""
    bits = _bits(master)
    return _upper(bits + 0x8000), bits.to(torch.int16)  # the lowest 16 are the difference to the nearest


def philox(low: Tensor, high: int, key: int) -> list[Tensor]:
    """Philox4x32-7 of the counters (low, high), 64 bits each: four tensors of 32 bits, as int64.

    A product of two words has 64 bits: int64 wraps around, its upper half is what a shift and a mask leave.
    """
    x, y = low & _WORD, (low >> 32) & _WORD
    z, w = (torch.full_like(low, part) for part in (high & _WORD, (high >> 32) & _WORD))
    key_x, key_z = key & _WORD, (key >> 32) & _WORD
    for _ in range(7):
        from_x, from_z = x * 0xD2511F53, z * 0xCD9E8D57
        x, y = ((from_z >> 32) & _WORD) ^ y ^ key_x, from_z & _WORD
        z, w = ((from_x >> 32) & _WORD) ^ w ^ key_z, from_x & _WORD
        key_x, key_z = (key_x + 0x9E3779B9) & _WORD, (key_z + 0xBB67AE85) & _WORD
    return [x, y, z, w]


def random_bits(position: int, count: int, step: int, seed: int, device: torch.device) -> Tensor:
    """`count` numbers of 16 bits, as int64 [count]: those from `position` on in the sequence of this step and seed."""
    first, last = position // DRAWN, (position + count + DRAWN - 1) // DRAWN
    words = philox(torch.arange(first, last, device=device), step, seed)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)
    return halves.reshape(-1)[position % DRAWN :][:count]


def round_at_random(master: Tensor, position: int, step: int, seed: int) -> Tensor:
    """fp32 -> bf16, up or down with the probability that keeps the mean; what bf16 holds, it leaves alone."""
    random = random_bits(position, master.numel(), step, seed, master.device)
    return _upper(_bits(master) + random.view(master.shape))


def _widened(params: list[Tensor], residuals: list[Tensor]) -> list[Tensor]:
    if residuals:
        return [join_residual(p, r) for p, r in zip(params, residuals, strict=True)]
    return [p.detach().float() for p in params]


@torch.no_grad()
def _round(
    params: list[Tensor], masters: list[Tensor], residuals: list[Tensor], positions: list[int], step: int, seed: int
) -> None:
    """Write what the masters have become into the parameters."""
    for i, (param, master) in enumerate(zip(params, masters, strict=True)):
        if residuals:
            nearest, residual = split_master(master)
            param.copy_(nearest)
            residuals[i].copy_(residual)
        else:
            param.copy_(round_at_random(master, positions[i], step, seed))


# --- states of fp32 ---------------------------------------------------------------------------------------------------


def _native(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    residuals: list[Tensor],
    positions: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    seed: int,
) -> None:
    scalars = (lr, beta1, beta2, eps, weight_decay, step, grad_scale, seed)
    lists = (params, grads, exp_avgs, exp_avg_sqs, residuals)
    written = [*params, *exp_avgs, *exp_avg_sqs, *residuals]
    if not all(t.is_contiguous() for t in written):
        adamw_bf16_step_.reference(*lists, positions, *scalars)
        return
    _check("adamw_bf16_step_", dict(zip((*LISTS, "residuals"), lists, strict=True)), positions, step, seed, 1)
    lists = (params, [g.contiguous() for g in grads], *lists[2:])
    module().adamw_bf16_step(*map(flat, lists), positions, *scalars)
    torch.autograd.graph.increment_version(written)


@raw_op(native=_native, fake=lambda *args: None, mutates=("params", "exp_avgs", "exp_avg_sqs", "residuals"))
def adamw_bf16_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    residuals: list[Tensor],
    positions: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    seed: int,
) -> None:
    """One step over every bf16 tensor, in place; the scalars are adamw_step_'s.

    params bf16 of any shape; grads bf16 or fp32, all alike; exp_avgs, exp_avg_sqs fp32. Of the two that choose the
    rounding one is empty:

    residuals: int16, zeros at first, written in place.
    positions: where each tensor begins in the sequence of random numbers of this `step` and `seed`; element j, counted
        row by row, takes number position + j. Tensors that are to round independently take ranges that do not
        overlap. Of a tensor of which this process holds a part, add the elements before that part: then the
        result does not depend on how it is cut.

    Raises:
        TypeError: another dtype. ValueError: lists, shapes, devices, positions or a seed that do not fit.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, residuals)
    _check("adamw_bf16_step_", dict(zip((*LISTS, "residuals"), lists, strict=True)), positions, step, seed, 1)
    masters, wide = _widened(params, residuals), [g.float() for g in grads]
    scalars = (lr, beta1, beta2, eps, weight_decay, step, grad_scale)
    adamw_step_.reference(masters, wide, exp_avgs, exp_avg_sqs, *scalars)
    _round(params, masters, residuals, positions, step, seed)


# --- states of 8 bits -------------------------------------------------------------------------------------------------


def _8bit_native(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_absmaxes: list[Tensor],
    exp_avg_sq_absmaxes: list[Tensor],
    residuals: list[Tensor],
    positions: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    seed: int,
) -> None:
    scalars = (lr, beta1, beta2, eps, weight_decay, step, grad_scale, seed)
    lists = (params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, residuals)
    written = [t for tensors in (params, *lists[2:]) for t in tensors]
    if not all(t.is_contiguous() for t in written):
        adamw_8bit_bf16_step_.reference(*lists, positions, *scalars)
        return
    named = dict(zip((*LISTS, *SCALES, "residuals"), lists, strict=True))
    _check("adamw_8bit_bf16_step_", named, positions, step, seed, DRAWN)
    if not params:
        return
    device = params[0].device
    lists = (params, [g.contiguous() for g in grads], *lists[2:])
    maps = dynamic_map(device), dynamic_map(device, False)
    module().adamw_8bit_bf16_step(*map(flat, lists), positions, *maps, *scalars)
    torch.autograd.graph.increment_version(written)


@raw_op(native=_8bit_native, fake=lambda *args: None, mutates=("params", *LISTS[2:], *SCALES, "residuals"))
def adamw_8bit_bf16_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_absmaxes: list[Tensor],
    exp_avg_sq_absmaxes: list[Tensor],
    residuals: list[Tensor],
    positions: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    seed: int,
) -> None:
    """The same step with states of 8 bits, as in adamw_8bit_step_; positions are multiples of 8."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes)
    named = dict(zip((*LISTS, *SCALES, "residuals"), (*lists, residuals), strict=True))
    _check("adamw_8bit_bf16_step_", named, positions, step, seed, DRAWN)
    masters, wide = _widened(params, residuals), [g.float() for g in grads]
    scalars = (lr, beta1, beta2, eps, weight_decay, step, grad_scale)
    adamw_8bit_step_.reference(masters, wide, *lists[2:], *scalars)
    _round(params, masters, residuals, positions, step, seed)
