"""Shared asserts. Tolerance is an error ratio: ours against float64 may be twice torch's own in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding an exact result to the dtype: what even a perfect kernel shows.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def assert_bits(ours: Tensor, wanted: Tensor, what: str = "") -> None:
    """Equal bit for bit, NaN equal to NaN; names the first difference."""
    assert ours.dtype == wanted.dtype and ours.shape == wanted.shape, f"{what}: {ours.dtype} {ours.shape}"
    same = (ours == wanted) | (ours.isnan() & wanted.isnan())
    if not bool(same.all()):
        where = tuple(int(i) for i in torch.nonzero(~same)[0])
        raise AssertionError(f"{what}: {int((~same).sum())} differ, first at {where}: {ours[where]} != {wanted[where]}")


def assert_as_good(
    ours: Tensor, torch_same_dtype: Tensor, exact: Tensor, what: str = "", slack: float = 1.0, atol: float = 1e-30
) -> None:
    """Our largest error against float64 is at most twice torch's, plus one rounding of the largest value.

    `slack` multiplies that rounding: for sums, whose order of additions may differ. `atol`: for results that
    cancel to nothing.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, wanted {tuple(exact.shape)}"
    if not ours.numel():
        return
    error = (ours.double() - exact).abs().max()
    allowed = 2 * (torch_same_dtype.double() - exact).abs().max()
    allowed += slack * 2 * UNIT.get(ours.dtype, 2.0**-24) * exact.abs().max() + atol
    assert bool(error <= allowed), f"{what}: error {error:.3e}, allowed {allowed:.3e}"  # a NaN fails too


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same, already rounded, inputs as float64."""
    return tuple(t.detach().double() for t in tensors)


def grads(outputs: Tensor | tuple[Tensor, ...], inputs: list[Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, inputs, [c.to(o.dtype) for o, c in zip(outputs, cotangents, strict=True)])


def strided(x: Tensor) -> Tensor:
    """The same values, every other element of a larger tensor."""
    big = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
    view = big[..., : 2 * x.shape[-1] : 2]
    view.copy_(x)
    return view


def padded_rows(x: Tensor) -> Tensor:
    """The same values, as the middle columns of a wider tensor."""
    big = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype)
    view = big[..., 3 : 3 + x.shape[-1]]
    view.copy_(x)
    return view


def sorted_choice(size: int, count: int) -> Tensor:
    return torch.randperm(size)[:count].sort().values
