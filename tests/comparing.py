"""Asserts that name the worst element. NaN and infinity fail: nothing is compared by ``error > tol``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_close(ours: Tensor, wanted: Tensor, *, atol: float, rtol: float = 0.0, what: str = "") -> None:
    """``|ours - wanted| <= atol + rtol·|wanted|`` everywhere, in float64."""
    assert ours.shape == wanted.shape, f"{what}: shape {tuple(ours.shape)}, wanted {tuple(wanted.shape)}"
    ours, wanted = ours.detach().double(), wanted.detach().double()
    error = (ours - wanted).abs()
    allowed = atol + rtol * wanted.abs()
    good = error <= allowed
    if bool(good.all()):
        return
    excess = (error - allowed).nan_to_num(nan=float("inf"))
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{what}: {int((~good).sum())} of {good.numel()} differ; worst at {at}: got {float(ours[at])!r}, "
        f"wanted {float(wanted[at])!r}, difference {float(error[at]):.3e}, allowed {float(allowed[at]):.3e}"
    )


def assert_equal(ours: Tensor, wanted: Tensor, what: str = "") -> None:
    """Same dtype, shape and values, bit for bit but for the sign of zero."""
    assert ours.dtype == wanted.dtype, f"{what}: {ours.dtype}, wanted {wanted.dtype}"
    assert_close(ours, wanted, atol=0.0, what=what)


def assert_series(ours: list[float], wanted: list[float], *, rtol: float, what: str = "series") -> None:
    """Two lists of numbers agree relative to their size."""
    one, other = torch.tensor(ours, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    assert_close(one, other, atol=0.0, rtol=rtol, what=what)


def assert_state_equal(ours: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Two state dicts: the same keys, the same bits."""
    assert list(ours) == list(wanted)
    for key, tensor in wanted.items():
        assert_equal(ours[key], tensor, key)


def max_diff(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach().double()).abs().max())
