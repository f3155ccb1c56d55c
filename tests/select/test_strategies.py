"""Every selection strategy picks what its definition says, computed here a second time from the untouched model."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_state_equal
from families import BY_NAME, llama, text_batch
from oracle import deltas_of
from torch import nn

import inlay
from inlay.select import expand_groups, pick_groups

HEAD, DATA = 8, [text_batch(0), text_batch(1)]
STRATEGIES = ["random", "weight", "activation", "product", "gradient"]
TARGETS = ["o_proj", "down_proj", "up_proj", "v_proj"]
INPUT_SIDE = ("o_proj", "down_proj", "c_proj")


def scores_of(model, strategy, names) -> dict[str, torch.Tensor]:
    """Channel scores by the paper's words."""
    model.eval()
    seen = {name: [] for name in names}
    weights = {name: model.get_submodule(name).weight for name in names}
    for name in names:
        side_in = name.endswith(INPUT_SIDE)
        record = lambda module, args, out, name=name, side_in=side_in: seen[name].append(args[0] if side_in else out)  # noqa: E731
        model.get_submodule(name).register_forward_hook(record)
    norms = dict.fromkeys(names, 0.0)
    for batch in DATA:
        model.zero_grad()
        model(**batch).loss.backward()
        for name in names:
            gradient = weights[name].grad
            gradient = gradient.t() if type(model.get_submodule(name)).__name__ == "Conv1D" else gradient
            norms[name] = norms[name] + gradient.square().sum(0 if name.endswith(INPUT_SIDE) else 1).sqrt()
    scores = {}
    for name in names:
        weight = weights[name].detach()
        weight = weight.t() if type(model.get_submodule(name)).__name__ == "Conv1D" else weight
        dim = 0 if name.endswith(INPUT_SIDE) else 1
        size = weight.square().sum(dim).sqrt()
        rows = torch.cat(
            [x.detach()[batch["attention_mask"].bool()] for x, batch in zip(seen[name], DATA, strict=True)]
        )
        activation = rows.abs().mean(0)
        scores[name] = {
            "weight": size,
            "activation": activation,
            "product": size * activation,
            "gradient": norms[name],
        }[strategy]
    return scores


@pytest.mark.parametrize("select", ["largest", "smallest"])
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "random"])
@pytest.mark.parametrize("family, targets", [("llama", TARGETS), ("gpt2", None)])
def test_picks_by_definition(family, targets, strategy, select):
    build = BY_NAME[family].build
    method = inlay.S2FT(ratio=0.5, target_modules=targets, strategy=strategy, select=select)
    tuned = inlay.tune(build(), method, calibration=DATA)
    scores = scores_of(build(), strategy, list(deltas_of(tuned)))
    for path, delta in deltas_of(tuned).items():
        width = HEAD if path.endswith(("o_proj", "v_proj", "attn.c_proj")) else 1
        grouped = scores[path].reshape(-1, width).sum(1)
        order = grouped.argsort(descending=select == "largest")
        count = round(0.5 * len(grouped))
        wanted = sorted(int(g) * width + i for g in order[:count] for i in range(width))
        assert delta.s2ft_indices.tolist() == wanted, path


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_largest_and_smallest_are_opposite_and_reproducible(strategy):
    def pick(**options):
        method = inlay.S2FT(ratio=0.5, granularity=1, strategy=strategy, **options)
        tuned = inlay.tune(llama(), method, calibration=DATA)
        return {path: set(delta.s2ft_indices.tolist()) for path, delta in deltas_of(tuned).items()}

    largest, smallest = pick(select="largest"), pick(select="smallest")
    assert largest == pick(select="largest")
    assert largest == {k: v for k, v in pick(select="largest", target_modules=TARGETS[::-1]).items() if k in largest}
    if strategy == "random":
        assert largest == smallest
    else:
        assert not any(largest[path] & smallest[path] for path in largest)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_calibration_leaves_the_model_as_it_was(strategy):
    model = llama().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    kept = torch.ones_like(model.model.norm.weight)
    model.model.norm.weight.grad = kept
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    inlay.S2FT(strategy=strategy).plan(model, DATA)
    assert_state_equal(model.state_dict(), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.model.norm.weight.grad is kept
    assert all(p.grad is None for name, p in model.named_parameters() if name != "model.norm.weight")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("strategy", ["activation", "product", "gradient"])
@pytest.mark.parametrize("calibration", [None, [], iter(())])
def test_strategies_that_need_data_say_so(strategy, calibration):
    with pytest.raises(ValueError, match="wants calibration data, got none; pass tune"):
        inlay.tune(llama(), inlay.S2FT(strategy=strategy), calibration=calibration)


def test_gradients_need_labels():
    batches = [{key: value for key, value in text_batch(0).items() if key != "labels"}]
    with pytest.raises(ValueError, match="calibration batches with labels; the loss is None"):
        inlay.tune(llama(), inlay.S2FT(strategy="gradient"), calibration=batches)


@pytest.mark.parametrize("strategy", ["activation", "gradient"])
def test_a_linear_that_calibration_does_not_reach(strategy):
    model = llama()
    model.model.layers[0].spare = nn.ModuleDict({"down_proj": nn.Linear(48, 32)})
    with pytest.raises(ValueError, match=r"calibration.*spare\.down_proj"):
        inlay.tune(model, inlay.S2FT(strategy=strategy), calibration=DATA)


@pytest.mark.parametrize("strategy", ["activation", "product", "gradient"])
def test_a_generator_is_read_once(strategy):
    method = inlay.S2FT(strategy=strategy, ratio=0.3)
    one = inlay.tune(llama(), method, calibration=DATA)
    other = inlay.tune(llama(), method, calibration=(batch for batch in DATA))
    for path, delta in deltas_of(one).items():
        assert torch.equal(delta.s2ft_indices, deltas_of(other)[path].s2ft_indices)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_second_adapter_is_selected_on_the_tuned_model(strategy):
    """Fused blocks hide nothing from calibration; the first adapter is untouched by it."""
    fresh = inlay.tune(llama(), inlay.S2FT(ratio=0.3, strategy=strategy), calibration=DATA)
    twice = inlay.tune(llama(), inlay.S2FT(ratio=0.2, target_modules=["up_proj", "down_proj", "o_proj"]))
    trainable = [name for name, p in twice.named_parameters() if p.requires_grad]
    inlay.tune(twice, inlay.S2FT(ratio=0.3, strategy=strategy), adapter_name="second", calibration=DATA)
    for path, delta in deltas_of(fresh).items():
        assert torch.equal(deltas_of(twice, "second")[path].s2ft_indices, delta.s2ft_indices), path
    twice.set_adapter("default")
    assert [name for name, p in twice.named_parameters() if p.requires_grad] == trainable
    assert all(p.grad is None for p in twice.parameters())


def test_ties_go_to_the_lower_channel():
    scores = torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0, 1.0])
    assert pick_groups(scores, 1, 2, "smallest").tolist() == [0, 2]
    assert pick_groups(scores, 1, 1, "largest").tolist() == [1]
    assert pick_groups(scores, 2, 1, "largest").tolist() == [0]
    assert pick_groups(scores, 3, 1, "smallest").tolist() == [0]
    assert pick_groups(torch.ones(5000), 1, 100, "largest").tolist() == list(range(100))
    assert expand_groups(torch.tensor([0, 3]), 3).tolist() == [0, 1, 2, 9, 10, 11]


@pytest.mark.parametrize("strategy", ["weight", "activation", "gradient"])
def test_nan_scores_are_refused(strategy):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.\d.*NaN"):
        inlay.tune(model, inlay.S2FT(strategy=strategy), calibration=DATA)
