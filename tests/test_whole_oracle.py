"""Methods that train tensors whole equal full fine-tuning of an untouched model restricted to what trains at each step:
the same losses, the same weights, and everything else bit for bit as it was."""

from __future__ import annotations

import copy
from fractions import Fraction

import families
import pytest
import torch
from comparing import assert_close, assert_equal, assert_series
from families import llama, text_batch
from methods import BY_NAME, ROWS, data_for, pairs, trainables
from torch import nn

import inlay
from inlay.schedules import active_schedules
from inlay.sites import block_of, blocks_of

STEPS = 6
#: eps above the rounding of gradients that should be zero, of which Adam would make full steps (biases of keys).
ADAMW = {"lr": 2e-2, "weight_decay": 0.1, "eps": 1e-2}
SCALED = ("cofitune",)  # whose gradients are not full fine-tuning's: see below
WHOLE = [row for row in ROWS if not row.make().pieces and row.base is None and row.name not in SCALED]


class Eager:
    """Full autograd and torch's AdamW on an eager model; what does not train is frozen and has no state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step(self, batch, trained: set[str]) -> float:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
            if name not in trained:
                parameter.grad = None
                self.optimizer.state.pop(parameter, None)
        self.optimizer.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        return loss.item()


def run(row, family, tolerance=2e-5):
    eager = family.build()
    before = {name: p.detach().clone() for name, p in eager.named_parameters()}
    tuned = inlay.tune(copy.deepcopy(eager), row.make(), calibration=data_for(row, family.batch)).train()
    oracle = Eager(eager)
    optimizer = inlay.optim.AdamW(trainables(tuned).values(), **ADAMW)
    ours, wanted, ever = [], [], set()
    for seed in range(STEPS):
        batch = family.batch(seed)
        optimizer.zero_grad()
        loss = tuned(**batch).loss
        trained = set(trainables(tuned))  # a schedule has chosen by now
        ever |= trained
        loss.backward()
        assert {name for name, p in tuned.named_parameters() if p.grad is not None} <= trained
        optimizer.step()
        ours.append(loss.item())
        wanted.append(oracle.step(batch, trained))
    assert_series(ours, wanted, rtol=tolerance, what="losses")
    assert len(set(wanted)) == STEPS
    theirs = dict(eager.named_parameters())
    for name, parameter in tuned.named_parameters():
        assert_close(parameter, theirs[name], atol=tolerance * family.slack, what=name)
        if name not in ever:
            assert_equal(parameter, before[name], name)
        else:
            assert not torch.equal(parameter, before[name]), f"{name} did not train"
    with inlay.disabled(tuned):
        for name, parameter in tuned.named_parameters():
            assert_equal(parameter, before[name], f"the base's {name}")
    return tuned


@pytest.mark.parametrize("row, family", pairs(WHOLE))
def test_equals_masked_full_fine_tuning(row, family):
    run(row, family)


@pytest.mark.parametrize("row", WHOLE, ids=str)
def test_rounding_of_bf16_weights_follows_fp32(row):
    """Weights kept in bf16 with a residual move exactly as fp32 masters of the same forward do."""
    if not row.whole:
        pytest.skip("held in fp32 anyway")
    models = [llama(num_hidden_layers=3).to(torch.bfloat16) for _ in range(2)]
    kept = inlay.tune(models[0], row.make(), calibration=data_for(row)).train()
    wide = inlay.tune(models[1], row.make(rounding="fp32"), calibration=data_for(row)).train()
    for model in (kept, wide):
        optimizer = inlay.optim.AdamW(trainables(model).values(), lr=1e-3, rounding="residual")
        for seed in range(4):
            optimizer.zero_grad()
            model(**text_batch(seed)).loss.backward()
            optimizer.step()
    fp32 = dict(wide.named_parameters())
    worst = max(
        float((p.float() - fp32[name].to(torch.bfloat16).float()).abs().max()) for name, p in kept.named_parameters()
    )
    assert worst < 2e-2  # gradients are rounded to bf16 in one and not in the other: not the same bits
    assert all(p.dtype == torch.bfloat16 for p in kept.parameters())


# --- what is chosen -------------------------------------------------------------------------------------------------


def chosen_over_time(model: nn.Module, steps: int) -> list[set[str]]:
    optimizer = inlay.optim.AdamW(trainables(model).values(), lr=1e-4)
    found = []
    for seed in range(steps):
        optimizer.zero_grad()
        loss = model(**text_batch(seed)).loss
        found.append(set(trainables(model)))
        loss.backward()
        optimizer.step()
    return found


def test_lisa_draws_blocks_and_frees_their_states():
    model = inlay.tune(llama(num_hidden_layers=6), inlay.LISA(layers=2, every=3)).train()
    blocks = blocks_of(model)
    optimizer = inlay.optim.AdamW(trainables(model).values(), lr=1e-4)
    seen = []
    for seed in range(18):
        optimizer.zero_grad()
        model(**text_batch(seed)).loss.backward()
        trained = set(trainables(model))
        seen.append(frozenset(block for name in trained if (block := block_of(name, blocks))))
        assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= trained
        optimizer.step()
        # what was drawn for the next step has no state yet, what was let go has none any more
        held = {id(p) for p in optimizer.state}
        assert held <= {id(p) for p in trainables(model).values()} | {id(p) for p in ()}
    assert all(len(drawn) == 2 for drawn in seen)
    assert all(len(set(seen[first : first + 3])) == 1 for first in range(0, 18, 3))
    assert len(set(seen)) >= 4


def test_lisa_draws_by_the_probabilities_given():
    model = inlay.tune(llama(num_hidden_layers=4), inlay.LISA(layers=2, every=1, probabilities=[0, 1, 0, 3])).train()
    blocks = blocks_of(model)
    for trained in chosen_over_time(model, 4):
        assert {block_of(name, blocks) for name in trained} == {None, blocks[1], blocks[3]}


@pytest.mark.parametrize("family", families.FAMILIES, ids=str)
def test_hft_trains_exactly_half(family):
    model = inlay.tune(family.build(), inlay.HFT())
    schedule = active_schedules(model)["default"]
    drawn, units = schedule.drawn(), schedule.units
    assert len(set(drawn)) == len(drawn)
    assert abs(Fraction(len(drawn), len(units)) - Fraction(1, 2)) <= Fraction(1, 2 * len(units))
    for members in schedule.groups.values():
        taken = sum(unit in drawn for unit in members)
        assert taken in (len(members) // 2, -(-len(members) // 2))


def test_hft_redraws_when_asked():
    model = inlay.tune(llama(num_hidden_layers=3), inlay.HFT(redraw_every=2)).train()
    seen = chosen_over_time(model, 6)
    assert seen[0] == seen[1] != seen[2] == seen[3] != seen[4]
    assert len(set(map(frozenset, chosen_over_time(inlay.tune(llama(), inlay.HFT()).train(), 4)))) == 1


@pytest.mark.parametrize(
    "method, wanted",
    [
        (inlay.FreezeLayers(layers=1), ["model.layers.3.", "model.norm", "lm_head"]),
        (inlay.FreezeLayers(layers=0.5), ["model.layers.2.", "model.layers.3.", "model.norm", "lm_head"]),
        (inlay.FreezeLayers(layers=0.25, head=False), ["model.layers.3."]),
        (inlay.Telly(frozen_layers=3), ["model.layers.3.", "model.norm", "lm_head"]),
        (inlay.Telly(frozen_layers=0.75, head=False), ["model.layers.3."]),
    ],
    ids=str,
)
def test_which_layers_train(method, wanted):
    tuned = inlay.tune(llama(num_hidden_layers=4), method)
    for name, parameter in tuned.named_parameters():
        assert parameter.requires_grad == any(name.startswith(start) for start in wanted), name


@pytest.mark.parametrize("family", families.FAMILIES, ids=str)
def test_a_tied_head_stays_frozen_and_what_stands_above_trains(family):
    """Nothing that the lowest trained block does not see gets a gradient, in any family."""
    model = family.build()
    tuned = inlay.tune(model, inlay.FreezeLayers(layers=1)).train()
    blocks = blocks_of(tuned)
    trained = set(trainables(tuned))
    assert {block_of(name, blocks) for name in trained} - {None} == {blocks[-1]}
    embeddings = {name for name, m in tuned.named_modules() if isinstance(m, nn.Embedding)}
    tied = {f"{name}.weight" for name in embeddings}
    assert not trained & tied
    tuned(**family.batch(0)).loss.backward()
    for name, parameter in trainables(tuned).items():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def trained_by(method, **changes) -> set[str]:
    return set(trainables(inlay.tune(llama(**changes), method)))


def test_targets_are_names_patterns_or_all_linears():
    everything = trained_by(inlay.Full())
    linears = {name for name in everything if "_proj." in name}
    mlps = {name for name in everything if ".mlp." in name}
    norms = {name for name in everything if "layers.1." in name and "norm" in name}
    assert trained_by(inlay.Full(target_modules="all-linear")) == linears
    assert trained_by(inlay.Full(target_modules=["mlp", "norm"])) == mlps | {"model.norm.weight"}
    assert trained_by(inlay.Full(target_modules=r".*layers\.1\..*norm")) == norms
    assert trained_by(inlay.Full(exclude_modules=["lm_head"])) == everything - {"lm_head.weight"}
    assert trained_by(inlay.HFT(target_modules="all-linear")) == linears
    with pytest.raises(ValueError, match="is no regular expression"):
        trained_by(inlay.Full(target_modules="(mlp"))


def test_the_first_thing_that_is_said_is_how_much():
    assert inlay.FreezeLayers(2).layers == inlay.LISA(2).layers == inlay.Surgical(2).layers == 2
    with pytest.raises(TypeError, match="layers"):
        inlay.Telly(layers=1)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, message",
    [
        (lambda: inlay.FreezeLayers(layers=3), "layers: wanted 1 to 2 blocks"),
        (lambda: inlay.FreezeLayers(layers=0), "layers: wanted a number of blocks"),
        (lambda: inlay.FreezeLayers(layers=1.5), "layers: wanted a number of blocks"),
        (lambda: inlay.Telly(frozen_layers=2, head=False), "leave nothing to train"),
        (lambda: inlay.LISA(layers=3), "layers: wanted 1 to 2 blocks at a time"),
        (lambda: inlay.LISA(probabilities=[1.0]), "probabilities: wanted one for each of 2 blocks"),
        (lambda: inlay.LISA(every=0), "every of 1 or more"),
        (lambda: inlay.HFT(redraw_every=-1), "redraw_every: wanted a number of steps"),
        (lambda: inlay.BitFit(), "has no bias to train"),
        (lambda: inlay.Full(rounding="nearest"), "rounding: wanted one of"),
        (lambda: inlay.Full(rounding="fp32", keep_original=False), "keep_original=False trains in place"),
        (lambda: inlay.Full(layers_to_transform=[2]), "wanted layers from 0 to 1, got 2"),
    ],
)
def test_what_is_impossible_says_what_is_possible(method, message):
    with pytest.raises(ValueError, match=message):
        inlay.tune(llama(), method())


@pytest.mark.parametrize("name", ["full", "lisa", "hft", "freeze-layers"])
def test_a_packed_base_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"model\.layers\.\d\.\S+\.weight trains whole under .*nf4.*skip_modules"):
        inlay.tune(llama(), BY_NAME[name].make(), base="nf4")
    packed = inlay.tune(llama(), inlay.LoRA(r=2), base="nf4")
    with pytest.raises(ValueError, match="quantized|found no tensor|a piece on"):
        inlay.tune(packed, BY_NAME[name].make(), adapter_name="second")


def test_an_optimizer_of_a_part_is_refused():
    model = inlay.tune(llama(num_hidden_layers=3), inlay.LISA(layers=1, every=1)).train()
    model(**text_batch(0)).loss.backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(RuntimeError, match="lacks .* parameters that the schedule may train"):
        optimizer.step()


def test_an_optimizer_without_hooks_is_noticed():
    class Own:
        def __init__(self, parameters):
            self.parameters = list(parameters)

        @torch.no_grad()
        def step(self):
            for p in self.parameters:
                if p.grad is not None:
                    p -= 1e-3 * p.grad

    model = inlay.tune(llama(), inlay.LISA(layers=1, every=1)).train()
    optimizer = Own(model.parameters())
    with pytest.raises(RuntimeError, match=r"no optimizer of torch .*derives from torch\.optim\.Optimizer"):
        for seed in range(20):
            model(**text_batch(seed)).loss.backward()
            optimizer.step()


# --- memory ---------------------------------------------------------------------------------------------------------


def test_what_never_trained_takes_no_memory_and_is_not_saved(tmp_path):
    from safetensors.torch import load_file

    model = inlay.tune(llama(num_hidden_layers=6), inlay.LISA(layers=1, every=100, embeddings=False)).train()
    chosen_over_time(model, 2)
    model.save_pretrained(tmp_path)
    blocks = blocks_of(model)
    saved = {
        block_of(key.removeprefix("base_model.model."), blocks)
        for key in load_file(tmp_path / "adapter_model.safetensors")
    }
    assert len(saved - {None}) == 1
    pointers = [p.data_ptr() for p in model.parameters()]
    with inlay.disabled(model):
        shared = sum(p.data_ptr() in pointers for p in model.parameters())
    assert shared == len(list(model.parameters())) - len(list(model.model.layers[0].parameters()))


def test_without_the_original_it_trains_merges_and_saves_but_cannot_be_disabled(tmp_path):
    eager = llama()
    kept = inlay.tune(copy.deepcopy(eager), inlay.Full()).train()
    gone = inlay.tune(copy.deepcopy(eager), inlay.Full(keep_original=False)).train()
    pointer = gone.lm_head.weight.data_ptr()
    for model in (kept, gone):
        chosen_over_time(model, 3)
    assert gone.lm_head.weight.data_ptr() == pointer
    for (name, one), other in zip(kept.named_parameters(), gone.parameters(), strict=True):
        assert_equal(one, other, name)
    with pytest.raises(ValueError, match="keep_original=False"), inlay.disabled(gone):
        pass
    with pytest.raises(ValueError, match="keep_original=False"):
        inlay.tune(gone, inlay.Full(), adapter_name="second")
    gone.save_pretrained(tmp_path)
    loaded = inlay.load(copy.deepcopy(eager), tmp_path)
    merged = inlay.merge(gone)
    for (name, one), other in zip(kept.named_parameters(), merged.parameters(), strict=True):
        assert_equal(dict(loaded.named_parameters())[name], one, name)
        assert_equal(one, other, name)
