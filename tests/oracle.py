"""Masked full fine-tuning: what every sparse method must equal.

Full autograd on an eager, untouched copy of the model; gradients masked to the trained entries; torch's AdamW; all
other entries put back after each step (weight decay would move them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from comparing import assert_close, assert_equal, assert_series
from torch import Tensor, nn

import inlay
from inlay.bases.linear import is_conv1d
from inlay.nn.whole import whole_tensors
from inlay.pieces.linear import SubmatrixDelta
from inlay.state import tuned_linears


def deltas_of(model: nn.Module, name: str = "default") -> dict[str, SubmatrixDelta]:
    """The deltas of one adapter by the linear they are on."""
    return {path: module.deltas[name] for path, module in tuned_linears(model).items() if name in module.deltas}


def trained_mask(model: nn.Module, path: str) -> Tensor:
    """True at the trained entries of the linear ``path``, in the layout its weight is stored in."""
    module = model.get_submodule(path)
    delta = module.deltas["default"]
    mask = torch.zeros(module.out_features, module.in_features, dtype=torch.bool)
    if delta.side == "in":
        mask[:, delta.s2ft_indices] = True
    else:
        mask[delta.s2ft_indices, :] = True
    return mask.t() if is_conv1d(module.plain_holder[0]) else mask


def trained_entries(model: nn.Module, path: str, weight: Tensor) -> Tensor:
    """The entries of ``weight`` (as stored) that the delta on ``path`` trains, in the shape of its values."""
    module = model.get_submodule(path)
    delta = module.deltas["default"]
    view = weight.t() if is_conv1d(module.plain_holder[0]) else weight
    return view.index_select(1 if delta.side == "in" else 0, delta.s2ft_indices)


class MaskedFineTuning:
    """Full fine-tuning of ``model`` in which only ``masks`` (by module name) may change.

    Attributes:
        gradients: the unmasked weight gradients of the last step, by module name.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        *,
        whole: Iterable[str] = (),
        pull: float = 0.0,
        **adamw: Any,
    ) -> None:
        """``whole``: parameters by name that train whole, beside the masked weights."""
        self.model, self.pull = model, pull
        model.requires_grad_(False)
        self.weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in masks}
        self.weights |= {name: model.get_parameter(name).requires_grad_(True) for name in whole}
        self.masks: dict[str, Tensor] = {
            name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()
        }
        self.masks |= masks
        self.deltas = set(masks)
        self.start = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimizer = torch.optim.AdamW(self.weights.values(), **adamw)
        self.gradients: dict[str, Tensor] = {}

    def step(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """One optimizer step on the summed loss of ``batches``; returns it."""
        self.optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss = self.model(**batch).loss
            loss.backward()
            total += loss.item()
        self.gradients = {name: weight.grad.clone() for name, weight in self.weights.items()}
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.grad.mul_(self.masks[name])
                lr = self.optimizer.param_groups[0]["lr"]
                # decay of a delta is towards the base, of what trains whole towards zero
                weight.sub_(lr * self.pull * (weight - self.start[name] if name in self.deltas else weight))
            self.optimizer.step()
            for name, weight in self.weights.items():
                weight.copy_(torch.where(self.masks[name], weight, self.start[name]))
        return total


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Mapping[str, Tensor]]) -> list[float]:
    """One optimizer step per batch; the loss series."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_equals_masked(
    tuned: nn.Module,
    eager: nn.Module,
    batches: list[Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    tolerance: float,
    pull: float = 0.0,
    **adamw: Any,
) -> None:
    """Train both and compare gradients of the first step, the loss series, and all weights after the last."""
    before = {name: tensor.clone() for name, tensor in eager.state_dict().items()}
    masks = {path: trained_mask(tuned, path) for path in deltas_of(tuned)}
    heads = whole_tensors(tuned, "default")
    masked = MaskedFineTuning(eager, masks, whole=heads, pull=pull, **adamw)

    wanted = [masked.step([batches[0]])]
    ours = train(tuned, optimizer, batches[:1])
    for path, delta in deltas_of(tuned).items():
        full = trained_entries(tuned, path, masked.gradients[path])
        assert bool(full.any()), f"{path}: the oracle has no gradient, which would prove nothing"
        # Against float64, either side's error in fp32 is up to 7e-6 of the largest (T5, whose attention is not scaled).
        allowed = 3 * tolerance * float(full.abs().max())
        assert_close(delta.s2ft_values.grad, full, atol=allowed, what=f"gradient of {path}")
    for key, head in heads.items():
        full = masked.gradients[key]
        assert bool(full.any()), f"{key}: the oracle has no gradient, which would prove nothing"
        assert_close(head.grad, full, atol=3 * tolerance * float(full.abs().max()), what=f"gradient of {key}")

    wanted += [masked.step([batch]) for batch in batches[1:]]
    ours += train(tuned, optimizer, batches[1:])
    assert_series(ours, wanted, rtol=tolerance, what="losses")
    assert len(set(wanted)) == len(wanted)

    merged = inlay.merge(tuned).state_dict()
    assert sorted(merged) == sorted(before)
    for key, tensor in eager.state_dict().items():
        path = key.rpartition(".")[0]
        assert_close(merged[key], tensor, atol=tolerance, what=key)
        if key.endswith(".weight") and path in masks:
            assert_equal(merged[key][~masks[path]], before[key][~masks[path]], f"untrained entries of {key}")
            assert not torch.equal(merged[key][masks[path]], before[key][masks[path]]), f"{key} did not train"
        elif key in heads:
            assert not torch.equal(merged[key], before[key]), f"{key} did not train"
        else:
            assert_equal(merged[key], before[key], key)


def randomize(model: nn.Module, size: float, seed: int = 0, name: str = "default") -> None:
    """Give every delta of an adapter a random change of about ``size``, as if it had been trained."""
    random = torch.Generator().manual_seed(3000 + seed)
    with torch.no_grad():
        for delta in deltas_of(model, name).values():
            delta.s2ft_values.add_(size * torch.randn(delta.s2ft_values.shape, generator=random))
