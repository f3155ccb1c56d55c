"""Shared asserts. Tolerance is an error ratio: ours against float64 beside torch's own in the same dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inlay import _native

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


#: Elements that are judged together, at least: as many as it takes for torch's own error among them to be typical.
GROUP = 64


def assert_as_good(
    ours: Tensor, torch_same_dtype: Tensor, exact: Tensor, what: str = "", slack: float = 1.0, atol: float = 1e-30
) -> None:
    """Our error against float64 beside torch's, at every size of element.

    The largest error is at most twice torch's, plus one rounding of the largest value. And elements are sorted by size
    and judged in groups: the mean error of a group is at most four times torch's in that group, plus one rounding of
    the group's largest. So small elements are allowed what arithmetic in this dtype does to small
    ones, not what it does to the largest: a kernel that drops them fails.

    `slack` multiplies the rounding: for sums, whose order of additions may differ. `atol`: for results that cancel to
    nothing.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, wanted {tuple(exact.shape)}"
    if not ours.numel():
        return
    unit = 2 * slack * UNIT.get(ours.dtype, 2.0**-24)
    error, near = ((t.detach().double() - exact).abs().flatten() for t in (ours, torch_same_dtype))
    size = exact.detach().abs().flatten()
    allowed = 2 * near.max() + unit * size.max() + atol
    assert bool(error.max() <= allowed), f"{what}: error {error.max():.3e}, allowed {allowed:.3e}"  # a NaN fails too
    for group in size.argsort().split(max(GROUP, len(size) // 16)):
        typical = error[group].mean()
        allowed = 4 * near[group].mean() + unit * size[group].max() + atol
        assert bool(typical <= allowed), (
            f"{what}: mean error {typical:.3e} of elements of {size[group].min():.1e} to {size[group].max():.1e}, "
            f"allowed {allowed:.3e}"
        )


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


def assert_threads_change_no_bit(make: Callable[[], dict[str, Tensor]]) -> None:
    """What ``make()`` computes, by its names, has the same bits for one thread and four on every instruction set."""
    engine, before = _native.module(), torch.get_num_threads()
    try:
        for isa in engine.available_isas()[1:]:
            engine.set_isa(isa)
            results = []
            for threads in (1, 4):
                torch.set_num_threads(threads)
                results.append(make())
            for name, one in results[0].items():
                assert_bits(results[1][name], one, f"{name} on {isa}")
    finally:
        engine.set_isa("")
        torch.set_num_threads(before)
