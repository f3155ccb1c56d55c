"""Every piece trains what its merge says: gradients, and five steps of AdamW, equal those of plain autograd through
``piece.merge(weight, bias)`` on an eager, untouched copy of the model. A new method gets this by its row."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import families
import pytest
import torch
from comparing import assert_close, assert_series
from methods import BY_NAME, ROWS, Row, data_for, pairs, shake, trainables
from torch import Tensor, nn
from torch.func import functional_call

import inlay
from inlay.bases import QuantizedWeight
from inlay.bases.linear import is_conv1d
from inlay.pieces.experts import ExpertsPiece
from inlay.pieces.linear import SubmatrixDelta
from inlay.schedules import SCHEDULES
from inlay.state import pieces_of, tuned_modules
from inlay.ties import is_tied

#: eps is large against the rounding of a gradient that is zero by construction (a key's bias), and AdamW would divide
#: such a one by itself.
STEPS, ADAMW = 5, {"lr": 3e-3, "weight_decay": 0.05, "eps": 1e-4}
PAIRS = pairs([row for row in ROWS if row.make().pieces])


class Merged:
    """An eager ``model`` whose modules compute with merged weights, made anew at each forward.

    Attributes:
        pieces: copies of the tuned model's by module. whole: tensors trained whole beside them.
    """

    def __init__(self, model: nn.Module, tuned: nn.Module) -> None:
        self.model = model.requires_grad_(False)
        self.pieces = {path: copy.deepcopy(piece) for path, piece in pieces_of(tuned, "default").items()}
        inside = {id(p) for piece in pieces_of(tuned, "default").values() for p in piece.parameters()}
        self.whole = {
            n: p.detach().clone().requires_grad_() for n, p in trainables(tuned).items() if id(p) not in inside
        }

    def parameters(self) -> dict[str, Tensor]:
        """By the names that they have in the tuned model."""
        held = {
            f"{path}.deltas.default.{n}": p for path, piece in self.pieces.items() for n, p in piece.named_parameters()
        }
        return held | self.whole

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        weights: dict[str, Any] = dict(self.whole)
        for path, piece in self.pieces.items():
            module = self.model.get_submodule(path)
            if isinstance(piece, ExpertsPiece):
                weights |= {f"{path}.{n}": piece.merge_stack(n, getattr(module, n)) for n in piece.names}
                continue
            turned = is_conv1d(module)
            weight, bias = piece.merge(module.weight.t() if turned else module.weight, getattr(module, "bias", None))
            weights[f"{path}.weight"] = weight.t() if turned else weight
            if bias is not None:
                weights[f"{path}.bias"] = bias
        return functional_call(self.model, weights, kwargs=dict(batch)).loss


@torch.no_grad()
def take_quantized(model: nn.Module, tuned: nn.Module) -> None:
    """Give the eager ``model`` the weights that the quantized base of ``tuned`` stands for."""
    for path, module in tuned.named_modules():
        if isinstance(module, QuantizedWeight):
            target = model.get_submodule(path)
            weight = module.dense_base(torch.float32)
            target.weight.copy_(weight.t() if is_conv1d(target) else weight)


def close(ours: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    assert sorted(ours) == sorted(wanted)
    largest = max(float(tensor.abs().max()) for tensor in wanted.values())
    for name, tensor in wanted.items():
        size = max(float(tensor.abs().max()), 1e-2 * largest)  # some are zero but for rounding
        assert_close(ours[name], tensor, atol=tolerance * size, what=f"{what} of {name}")


@pytest.mark.parametrize("row, family", PAIRS)
def test_a_tuned_model_trains_as_its_merge_says(row, family):
    check(row, family)


def test_it_notices_a_wrong_merge(monkeypatch):
    merge = SubmatrixDelta.merge
    monkeypatch.setattr(SubmatrixDelta, "merge", lambda self, weight, bias: merge(self, weight * 1.001, bias))
    with pytest.raises(AssertionError, match="gradient of"):
        check(BY_NAME["s2ft"], families.BY_NAME["llama"])


def check(row: Row, family: families.Family) -> None:
    eager = family.build()
    tuned = copy.deepcopy(eager)
    method = row.make()
    if method.modules_to_save and not hasattr(tuned, "lm_head"):
        pytest.skip("this family has no lm_head of its own")
    tuned = shake(
        inlay.tune(tuned, method, base=row.base, calibration=data_for(row, family.batch)).train(not row.dropout)
    )
    take_quantized(eager, tuned)
    tuned._modules.pop(SCHEDULES, None)  # what changes gradients beside the loss has tests of its own
    merged = Merged(eager.train(not row.dropout), tuned)
    assert set(merged.pieces) == {
        path for path, module in tuned_modules(tuned).items() if not all(map(is_tied, module.pieces().values()))
    }
    held = trainables(tuned)
    ours = torch.optim.AdamW(held.values(), **ADAMW)
    theirs = torch.optim.AdamW(merged.parameters().values(), **ADAMW)
    losses: tuple[list[float], list[float]] = [], []
    for step in range(STEPS):
        batch = family.batch(step)
        for optimizer, loss, kept in ((ours, tuned(**batch).loss, losses[0]), (theirs, merged.loss(batch), losses[1])):
            optimizer.zero_grad()
            loss.backward()
            kept.append(loss.item())
        if step == 0:
            found = {name: p.grad for name, p in held.items()}
            wanted = {name: p.grad for name, p in merged.parameters().items() if p.requires_grad}
            assert all(bool(grad.any()) for grad in wanted.values())
            close(found, wanted, 1e-4 * family.slack, "gradient")
        ours.step(), theirs.step()
    assert_series(*losses, rtol=2e-5 * family.slack, what="losses")
    close(held, {n: p for n, p in merged.parameters().items() if p.requires_grad}, 1e-4 * family.slack, "value")
