"""A delta on a linear whose weight somebody else reads would do nothing: it is refused, whoever the reader is."""

from __future__ import annotations

import copy

import pytest
import torch
from census.tiny import first_tensor, tiny_model
from families import FAMILIES, llama, text_batch
from torch import nn
from torch.nn import functional

import inlay
from inlay.nn.use_check import check_by_probe, observed


class Reader(nn.Module):
    """``second`` is read in some mode; ``third`` is used in no forward; ``fourth`` is called and its dtype is read."""

    def __init__(self, reads_in: str) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.BatchNorm1d(8)
        self.reads_in = reads_in

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(3, 8)}

    def forward(self, x):
        x = self.norm(self.first(x)).to(self.fourth.weight.dtype)
        read = self.reads_in == "both" or (self.reads_in == "training") == self.training
        x = functional.linear(x, self.second.weight, self.second.bias) if read else self.second(x)
        return self.fourth(x)


TARGETS = {"target_modules": ["first", "second", "third", "fourth"]}


@pytest.mark.parametrize("base", [None, "nf4"])
def test_what_is_read_at_tune_is_refused_there(base):
    model = Reader("eval")
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match="^second: its Reader reads its weight without calling it.*exclude_modules"):
        inlay.tune(model, inlay.LoRA(r=2, **TARGETS), base=base)
    assert type(model.second) is nn.Linear and model.training and torch.equal(rng, torch.get_rng_state())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    tuned = inlay.tune(model, inlay.LoRA(r=2, exclude_modules=["second"], **TARGETS), base=base)
    tuned.train()(torch.randn(3, 8)).sum().backward()


@pytest.mark.parametrize("method", [inlay.LoRA(r=2, **TARGETS), inlay.S2FT(ratio=0.5, **TARGETS)], ids=["lora", "s2ft"])
def test_what_is_read_in_training_only_is_refused_at_the_first_forward(method):
    tuned = inlay.tune(Reader("training"), method)
    tuned.eval()(torch.randn(3, 8))
    for model in (copy.deepcopy(tuned), tuned):  # a copy is looked at too
        with pytest.raises(ValueError, match="second: its Reader reads its weight without calling it"):
            model.train()(torch.randn(3, 8))
        assert all(type(module).__name__ == "TunedLinear" for module in (model.first, model.second))


def test_one_forward_is_looked_at_and_classes_come_back():
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2)).train()
    classes = {name: type(module) for name, module in tuned.named_modules()}
    for _ in range(2):
        tuned(**text_batch(0)).loss.backward()
        assert {name: type(module) for name, module in tuned.named_modules()} == classes
    broken = inlay.tune(llama(), inlay.S2FT(ratio=0.2)).train()
    with pytest.raises(Exception, match=r"\w"):
        broken(input_ids=torch.ones(1, 2, 3))
    assert {name: type(module) for name, module in broken.named_modules()} == classes


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("base", [None, "nf4"])
def test_families_call_what_they_have(family, base):
    """Also through fused blocks, which take a linear's tensors instead of calling it."""
    tuned = inlay.tune(family.build(), inlay.LoRA(r=2), base=base).train()
    names = {name: module for name, module in tuned.named_modules() if hasattr(module, "deltas")}
    with observed(names) as uses:
        tuned(**family.batch(0))
    assert all(use.called for use in uses.values())


def read_by_their_parents(model) -> set[str]:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with observed(linears) as uses, torch.no_grad():
        first_tensor(model(**tiny_inputs[type(model).__name__]))
    return {name for name, use in uses.items() if use.read and not use.called}


tiny_inputs: dict[str, dict] = {}


@pytest.mark.parametrize("model_type, leaf", [("wavlm", "out_proj"), ("llama", None)])
def test_transformers_readers(model_type, leaf):
    model, inputs = tiny_model(model_type)
    model.config.apply_spec_augment = False  # which wants longer sounds
    tiny_inputs[type(model).__name__] = inputs
    read = read_by_their_parents(model)
    assert {name.rpartition(".")[2] for name in read} >= ({leaf} if leaf else set())
    if leaf is None:
        assert not read
        return
    tuned = inlay.tune(copy.deepcopy(model), inlay.LoRA(r=2, target_modules=sorted(read)))
    with pytest.raises(ValueError, match="reads its weight without calling it"):
        tuned.train()(**inputs)
    method = inlay.LoRA(r=2, exclude_modules=sorted(read))
    inlay.tune(model, method).train()(**inputs)


def test_torch_attention_is_refused_by_use():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.first(x)
            return self.attention(x, x, x)[0]

    model = Holder()
    with observed({"out": model.attention.out_proj, "first": model.first}) as uses:
        model(torch.randn(1, 3, 8))
    assert uses["out"].read and not uses["out"].called and uses["first"].called
    assert check_by_probe(model, ["first"]) is False  # no input of its own: the first training forward tells
