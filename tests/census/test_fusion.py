"""Every norm, MLP and attention class of the tiny models: fused and equal at every size of input, or left alone."""

from __future__ import annotations

import copy
import re
from collections import Counter

import pytest
import torch
from torch import nn

from census.test_families import COMMON, REST
from census.tiny import tiny_model
from inlay.nn.attention import FusedAttention
from inlay.nn.blocks import FusedGatedMLP, FusedGatedRMSNorm, FusedRMSNorm, install_blocks
from inlay.nn.probe import MAGNITUDES

KINDS = {"norm": r".*(RMSNorm|Norm|RMSNormGated)", "MLP": r".*(MLP|Mlp|FeedForward)", "attention": r".*Attention"}


def outputs_and_gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What comes out, and the gradients of the input (which is its gate too, where it takes one) and all parameters."""
    x = x.clone().requires_grad_()
    parameters = list(module.parameters())
    y = module(x, x.flip(0)) if "Gated" in type(module).__name__ and hasattr(module, "weight") else module(x)
    random = torch.Generator().manual_seed(2)
    grads = torch.autograd.grad(y, [x, *parameters], torch.randn(y.shape, generator=random), allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


def compare(plain: nn.Module, fused: nn.Module) -> None:
    """A norm or an MLP beside its fused self, on inputs from 1e-3 to 1e4."""
    width = plain.weight.shape[0] if hasattr(plain, "weight") else plain.gate_proj.in_features
    random = torch.Generator().manual_seed(1)
    x = torch.randn(3, width, generator=random)
    for size in MAGNITUDES:
        for ours, wanted in zip(outputs_and_gradients(fused, x * size), outputs_and_gradients(plain, x * size)):
            finite = wanted.isfinite()
            assert torch.equal(ours.isfinite(), finite), (type(plain).__name__, size)
            largest = float(wanted[finite].abs().max()) if bool(finite.any()) else 0.0
            error = float((ours - wanted)[finite].abs().max()) if bool(finite.any()) else 0.0
            assert error <= 1e-4 * largest + 1e-12, (type(plain).__name__, size, error, largest)


def census(model_types: list[str]) -> dict[str, Counter]:
    """How many classes of each kind are fused, and how many are left alone."""
    seen: set[type] = set()
    counts = {kind: Counter() for kind in KINDS}
    for model_type in model_types:
        try:
            model, _ = tiny_model(model_type)
        except Exception:
            continue
        fused = copy.deepcopy(model)
        install_blocks(fused)
        for (name, plain), other in zip(model.named_modules(), fused.modules(), strict=True):
            kind = next((k for k, pattern in KINDS.items() if re.fullmatch(pattern, type(plain).__name__)), None)
            if kind is None or type(plain) in seen:
                continue
            seen.add(type(plain))
            is_fused = isinstance(other, FusedRMSNorm | FusedGatedRMSNorm | FusedGatedMLP | FusedAttention)
            counts[kind]["fused" if is_fused else "left alone"] += 1
            if isinstance(other, FusedRMSNorm | FusedGatedRMSNorm | FusedGatedMLP):
                compare(plain, other)  # attention is compared inside its model, by the census of families
            elif not is_fused:
                assert type(other) is type(plain), name
    print({kind: dict(count) for kind, count in counts.items()})
    return counts


def test_classes_of_common_architectures():
    counts = census(COMMON)
    for kind, (fused, alone) in {"norm": (20, 5), "MLP": (10, 5), "attention": (8, 10)}.items():
        assert counts[kind]["fused"] >= fused and counts[kind]["left alone"] >= alone, (kind, counts[kind])


@pytest.mark.slow
def test_classes_of_all_other_architectures():
    counts = census(REST)
    assert sum(sum(count.values()) for count in counts.values()) > 200
