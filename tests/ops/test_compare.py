"""The assert that every op is judged by catches what a maximum norm lets through."""

from __future__ import annotations

import pytest
import torch
from _compare import assert_as_good


def case(dtype=torch.bfloat16, size=4096):
    """An exact product over five magnitudes, and torch's rounding of it."""
    exact = torch.randn(size, dtype=torch.float64) * 10.0 ** -torch.linspace(0, 5, size, dtype=torch.float64)
    return exact, exact.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("slack", [1, 4])
def test_what_it_catches(dtype, slack):
    exact, good = case(dtype)
    assert_as_good(good, good, exact, slack=slack)
    small = exact.abs() < exact.abs().quantile(0.25)
    every_seventh = torch.arange(len(exact)) % 7 == 0
    for wrong in (good * ~small, good * ~every_seventh, good * 1.1, torch.where(small, -good, good)):
        with pytest.raises(AssertionError, match="error"):
            assert_as_good(wrong.to(dtype), good, exact, slack=slack)
    with pytest.raises(AssertionError):
        assert_as_good(good.clone().index_fill_(0, torch.tensor([5]), float("nan")), good, exact)
    with pytest.raises(AssertionError):
        assert_as_good(good.clone().index_fill_(0, torch.tensor([5]), 0.0), good, exact)  # one of the largest
