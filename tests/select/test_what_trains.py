"""Choices of what trains: each against the slow computation that it stands for."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from comparing import assert_close, assert_equal
from families import FAMILIES, llama, text_batch
from torch import nn

import inlay
from inlay.bases.linear import is_linear, out_in_view
from inlay.select.budget import RESOLUTION, best_within
from inlay.select.fisher import fisher_of_linears
from inlay.select.trial import mean_loss, train_some, trial
from inlay.select.units import unit_importance
from inlay.sites import block_of, blocks_of

DATA = [text_batch(seed) for seed in (900, 901)]


def snapshot(model: nn.Module):
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    return copy.deepcopy(model.state_dict()), flags, [m.training for m in model.modules()], torch.random.get_rng_state()


def assert_untouched(model: nn.Module, before) -> None:
    state, flags, modes, random = before
    for key, tensor in model.state_dict().items():
        assert_equal(tensor, state[key], key)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)


# --- a budget over depth --------------------------------------------------------------------------------------------


def brute_force(value, own, passing, budget):
    best, chosen = 0.0, []
    for count in range(1, len(value) + 1):
        for places in itertools.combinations(range(len(value)), count):
            cost = sum(own[p] for p in places) + sum(passing[min(places) + 1 :])
            if cost <= budget and sum(value[p] for p in places) > best + 1e-12:
                best, chosen = sum(value[p] for p in places), list(places)
    return best, chosen


@pytest.mark.parametrize("seed", range(40))
def test_the_best_choice_within_a_budget(seed):
    """Costs are whole thousandths of the budget here, so that rounding up changes nothing."""
    random = torch.Generator().manual_seed(seed)
    count = int(torch.randint(2, 10, (), generator=random))
    value = torch.rand(count, generator=random).sub(0.2).tolist()
    own, passing = (torch.randint(0, 500, (count,), generator=random).double().tolist() for _ in range(2))
    chosen = best_within(value, own, passing, float(RESOLUTION))
    best, wanted = brute_force(value, own, passing, RESOLUTION)
    assert abs(sum(value[p] for p in chosen) - best) < 1e-9, (chosen, wanted)
    assert not chosen or sum(own[p] for p in chosen) + sum(passing[min(chosen) + 1 :]) <= RESOLUTION


def test_nothing_fits_into_no_budget():
    assert best_within([1.0, 2.0], [5.0, 5.0], [1.0, 1.0], 4.0) == []
    for nothing in (0.0, -0.5, -1e9):  # what the forward costs is more than the share
        assert best_within([1.0, 2.0, 3.0], [0.1, 0.1, 0.0], [0.1, 0.1, 0.0], nothing) == []
    assert best_within([1.0, 2.0], [5.0, 3.0], [1.0, 1.0], 4.0) == [1]


# --- Fisher information ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in ("mixtral", "t5", "t5-gated")], ids=str)
def test_fisher_is_the_mean_of_squared_gradients_of_single_samples(family):
    model = family.build()
    before = snapshot(model)
    found = fisher_of_linears(model, [family.batch(900), family.batch(901)])
    assert_untouched(model, before)
    wanted: dict[str, float] = {}
    model.eval()
    for seed in (900, 901):
        batch = family.batch(seed)
        for row in range(len(batch["labels"])):
            model.zero_grad()
            model(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
            for name, module in model.named_modules():
                if is_linear(module) and module.weight.grad is not None:
                    wanted[name] = wanted.get(name, 0.0) + float(module.weight.grad.double().square().sum()) / 6
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, value in found.items():
        if id(model.get_submodule(name).weight) not in embeddings:  # a tied head's gradient is not the product's alone
            assert abs(value - wanted[name]) <= 2e-4 * wanted[name], name
    assert len(found) >= len(blocks_of(model)) * 4


def test_surgical_takes_the_blocks_of_the_highest_score():
    model = llama(num_hidden_layers=4)
    method = inlay.Surgical(layers=2)
    scores = method.scores(model, DATA)
    tuned = inlay.tune(model, method, calibration=DATA)
    trained = {block_of(n, blocks_of(tuned)) for n, p in tuned.named_parameters() if p.requires_grad}
    assert trained == set(sorted(scores, key=lambda block: -scores[block])[:2])


# --- trials ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trial_trains_and_puts_everything_back(dtype):
    model = llama().to(dtype)
    before, keys = snapshot(model), ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    with trial(model, keys) as parameters:
        start = mean_loss(model, DATA)
        train_some(model, parameters.values(), DATA, 12, 1e-2)
        assert mean_loss(model, DATA) < start
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[0][key]) == (key not in keys), key
    assert_untouched(model, before)


def test_neft_takes_the_rows_that_turn_the_most():
    model = llama()
    names = [n for n, m in model.named_modules() if is_linear(m) and n != "lm_head"]
    probe = copy.deepcopy(model)
    with trial(probe, [f"{n}.weight" for n in names]) as weights:
        train_some(probe, weights.values(), DATA, 5, 1e-3)
        cosines = {
            (name, row): float(torch.cosine_similarity(old.double(), new.double(), dim=0))
            for name in names
            for row, (old, new) in enumerate(
                zip(out_in_view(model.get_submodule(name)), out_in_view(probe.get_submodule(name)), strict=True)
            )
        }
    wanted = set(sorted(cosines, key=lambda place: cosines[place])[: round(0.1 * len(cosines))])
    before = snapshot(model)
    tuned = inlay.tune(model, inlay.NeFT(ratio=0.1, probe_steps=5, probe_lr=1e-3), calibration=DATA)
    found = {
        (name, int(row))
        for name, module in tuned.named_modules()
        if hasattr(module, "deltas")
        for row in module.deltas["default"].s2ft_indices
    }
    assert len(found) == len(wanted) and len(found & wanted) >= 0.98 * len(wanted)  # ties aside
    assert torch.equal(torch.random.get_rng_state(), before[3])


def test_subtuning_finds_the_block_that_helps_and_stops_where_none_does():
    model = llama(num_hidden_layers=3)
    method = inlay.SubTuning(layers=3, probe_steps=6, probe_lr=3e-3)
    inside = {
        block: [k for k, _ in model.named_parameters() if k.startswith(f"{block}.")] for block in blocks_of(model)
    }
    batches = [*DATA, DATA[0]]
    losses = {block: method._try(model, keys, batches[:-1], batches[-1:]) for block, keys in inside.items()}
    found = method.search(model, inside, 3, batches)
    assert found[0] == min(losses, key=lambda block: losses[block])
    assert method.search(model, inside, 1, batches) == found[:1]
    with pytest.raises(ValueError, match=r"no block gains more than eps=50"):
        inlay.SubTuning(eps=50.0).search(model, inside, 1, batches)
    with pytest.raises(ValueError, match="two calibration batches or more"):
        inlay.tune(model, inlay.SubTuning(), calibration=DATA[:1])


# --- soft masks -----------------------------------------------------------------------------------------------------


def test_unit_importance_is_the_gradient_of_a_mask():
    model = llama()
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    found = unit_importance(model, names, DATA)
    for name in names:
        module = model.get_submodule(name)
        mask = torch.ones(module.out_features, requires_grad=True)
        handle = module.register_forward_hook(lambda m, a, y, mask=mask: y * mask)
        model.eval()
        for batch in DATA:
            model(**batch).loss.backward()
        handle.remove()
        assert_close(found[name], mask.grad.abs(), atol=1e-6, what=name)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "mixtral"], ids=str)
def test_cofitune_scales_gradients_by_what_units_matter(family):
    model = family.build()
    plain = inlay.tune(copy.deepcopy(model), inlay.CoFiTune(depth=(0, 1), soft_mask=False)).train()
    data = [family.batch(900)]
    soft = inlay.tune(copy.deepcopy(model), inlay.CoFiTune(depth=(0, 1)), calibration=data).train()
    for tuned in (plain, soft, soft):  # twice: the hook is put once
        tuned(**family.batch(0)).loss.backward()
    schedule = soft.inlay_schedules["default"]
    scaled = 0
    for place, (key, dim) in enumerate(zip(schedule.keys, schedule.dims, strict=True)):
        factor = getattr(schedule, f"factor{place}")
        assert 0 <= float(factor.min()) <= float(factor.max()) <= 1
        shape = [1] * soft.get_parameter(key).dim()
        shape[dim] = -1
        wanted = 2 * plain.get_parameter(key).grad * factor.view(shape)
        assert_close(soft.get_parameter(key).grad, wanted, atol=1e-5, what=key)
        scaled += int(float(factor.min()) < 0.9)
    assert scaled == len(schedule.keys) > 0


def test_cofitune_trains_its_range_and_its_module():
    tuned = inlay.tune(llama(num_hidden_layers=8), inlay.CoFiTune(soft_mask=False))
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
    wanted = {f"model.layers.{i}.mlp.{n}_proj.weight" for i in (2, 3) for n in ("gate", "up", "down")}
    assert trained == wanted
    tuned = inlay.tune(llama(num_hidden_layers=8), inlay.CoFiTune(modules="attention", soft_mask=False))
    assert {n.split(".")[3] for n, p in tuned.named_parameters() if p.requires_grad} == {"self_attn"}


# --- GreenTrainer ---------------------------------------------------------------------------------------------------


def steps(model, count, lr=1e-3):
    optimizer = inlay.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    trained = []
    for seed in range(count):
        optimizer.zero_grad()
        loss = model(**text_batch(seed)).loss
        trained.append({name for name, p in model.named_parameters() if p.requires_grad})
        loss.backward()
        optimizer.step()
    return trained


@pytest.mark.parametrize("rho", [0.45, 0.6, 0.8, 1.0])
def test_green_trainer_keeps_to_its_share_of_flops(rho, capsys):
    model = inlay.tune(llama(num_hidden_layers=4), inlay.GreenTrainer(rho=rho, every=4, cost="flops")).train()
    trained = steps(model, 8)
    schedule = model.inlay_schedules["default"]
    assert schedule.planned() <= rho + 1e-9
    everything = set(schedule.keys)
    assert trained[0] == trained[4] == everything  # the steps that weigh
    assert trained[1] == trained[2] == trained[3]
    if rho < 0.8:
        assert trained[1] < everything
    assert f"rho={rho:g}" in capsys.readouterr().out


def test_green_trainer_weighs_by_what_the_step_gained():
    """Importance is the loss that a tensor's own part of the step takes away, to first order."""
    model = inlay.tune(llama(), inlay.GreenTrainer(rho=0.9, every=50, cost="flops")).train()
    eager = llama()
    names = [name for name, _ in eager.named_parameters()]
    steps(model, 1, lr=1e-4)
    importance = dict(
        zip(model.inlay_schedules["default"].keys, model.inlay_schedules["default"].clock["importance"], strict=True)
    )
    batch = text_batch(0)
    start = float(eager(**batch).loss)
    for name in names:
        moved = copy.deepcopy(eager)
        with torch.no_grad():
            moved.get_parameter(name).copy_(model.get_parameter(name))
        gain = start - float(moved(**batch).loss)
        assert abs(gain - importance[name]) <= 0.1 * abs(gain) + 2e-5, name


def test_green_trainer_measures_then_chooses(capsys):
    model = inlay.tune(llama(num_hidden_layers=4), inlay.GreenTrainer(rho=0.9, every=20)).train()
    trained = steps(model, 9)
    schedule = model.inlay_schedules["default"]
    everything = set(schedule.keys)
    assert trained[:3] == [everything] * 3
    assert (
        trained[3] == trained[4] == {"model.layers.0.input_layernorm.weight"}
    )  # deep, and next to no gradient of its own
    assert trained[5] == trained[6] == {"model.norm.weight"}
    assert bool(schedule.known) and float(schedule.seconds[0]) > 0
    assert trained[7] == trained[8]
    assert "of full fine-tuning's time" in capsys.readouterr().out


def test_green_trainer_times_steps_and_nothing_between_them(monkeypatch, capsys):
    """On a clock of its own: a forward takes 1, a step 0.5, a backward 4 with every weight; 100 between the steps."""
    clock = [0.0]
    monkeypatch.setattr("inlay.schedules.green.now", lambda: clock[0])
    model = inlay.tune(llama(num_hidden_layers=4), inlay.GreenTrainer(rho=0.9, every=3)).train()
    schedule = model.inlay_schedules["default"]
    optimizer = inlay.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: clock.__setitem__(0, clock[0] + 0.5))
    for seed in range(12):
        clock[0] += 100.0
        loss = model(**text_batch(seed)).loss
        clock[0] += 1.0 + {"all": 4.0, "deepest": 1.5, "top": 0.5, "chosen": 1.0}[schedule.phase()]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(float(schedule.seconds.sum()) - 5.5) < 1e-9
    printed = [line for line in capsys.readouterr().out.splitlines() if "measured" in line]
    assert printed and all(line.endswith(f"measured {2.5 / 5.5:.1%} of a full step's time") for line in printed)


@pytest.mark.parametrize("taken", [2, 3, 4, 6])
def test_green_trainer_stopped_while_it_measures_begins_anew(taken):
    method = inlay.GreenTrainer(rho=0.9, every=20)
    first = inlay.tune(llama(num_hidden_layers=4), method).train()
    steps(first, taken)
    second = inlay.tune(llama(num_hidden_layers=4), method).train()
    second.load_state_dict(first.state_dict())
    schedule = second.inlay_schedules["default"]
    assert int(schedule.since) == taken
    steps(second, 7)
    assert bool(schedule.known) and schedule.phase() == "chosen"


def test_green_trainer_counts_a_tied_head_with_its_table():
    """Its product is in the forward, its input's gradient in every step, its weight gradient is the table's."""
    flops = {}
    for tied in (False, True):
        model = inlay.tune(llama(tie_word_embeddings=tied), inlay.GreenTrainer(rho=1.0, every=9, cost="flops")).train()
        model.set_padding_free(False)
        steps(model, 1)
        schedule = model.inlay_schedules["default"]
        flops[tied] = (schedule.costs, dict(zip(schedule.keys, schedule.costs.own, strict=True)), schedule.keys)
    (apart, own, keys), (together, own_tied, keys_tied) = flops[False], flops[True]
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    size = text_batch(0)["input_ids"].numel()
    product = 2.0 * size * llama().lm_head.weight.numel()
    assert head in keys and head not in keys_tied
    assert own[head] == own_tied[table] == product and own[table] == llama().lm_head.weight.numel()
    assert apart.passing[keys.index(head)] == product and together.forward == apart.forward + product
    assert sum(together.passing) == sum(apart.passing) - product


def test_green_trainer_spreads_measured_time_by_what_it_goes_by():
    """Weight gradients by FLOPs, the optimizer's step by elements; all of it is the time of a whole step."""
    model = inlay.tune(llama(num_hidden_layers=4), inlay.GreenTrainer(rho=0.9, every=20)).train()
    steps(model, 8)
    schedule = model.inlay_schedules["default"]
    schedule.seconds.copy_(torch.tensor([3.0, 2.0, 4.0, 1.0]))
    costs, counted = schedule.weighed(), schedule.costs
    assert costs.forward == 3.0 and abs(sum(costs.passing) - 2.0) < 1e-9 and abs(sum(costs.own) - 5.0) < 1e-9
    for own, flops, size in zip(costs.own, counted.own, counted.elements, strict=True):
        assert abs(own - 4.0 * flops / sum(counted.own) - size / sum(counted.elements)) < 1e-9
    schedule.chosen_mask.fill_(True)
    assert abs(schedule.planned() - 1.0) < 1e-9


def test_a_share_that_the_forward_exceeds_is_refused():
    with pytest.raises(ValueError, match=r"rho: wanted a share in \(1/3, 1\]"):
        inlay.GreenTrainer(rho=0.3)
    model = inlay.tune(llama(num_hidden_layers=4), inlay.GreenTrainer(rho=0.335, cost="flops")).train()
    with pytest.raises(RuntimeError, match=r"the forward alone is .* the cheapest tensor makes it"):
        steps(model, 1)
