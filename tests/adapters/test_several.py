"""Several adapters on one base: switching, adding up, saving, loading and deleting one of them."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import assert_close, assert_equal, assert_state_equal
from families import BY_NAME, eval_logits, llama, text_batch
from oracle import deltas_of, randomize, train

import inlay

BATCH = text_batch(0)


def one(seed, **options):
    """A model with one adapter of its own."""
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2, seed=seed, **options))
    randomize(tuned, 0.1, seed)
    return tuned


@pytest.fixture
def two(tmp_path):
    """Two saved adapters, the model that carries both, and each one's logits alone."""
    wanted = {}
    for name, seed in {"first": 1, "second": 2}.items():
        tuned = one(seed)
        wanted[name] = eval_logits(tuned, BATCH)
        tuned.save_pretrained(tmp_path / name)
    model = inlay.load(llama(), tmp_path / "first", name="first")
    assert inlay.load(model, tmp_path / "second", name="second") is model
    return model, wanted, tmp_path


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_last_loaded_is_active_and_alone_trainable(two):
    model, wanted, _ = two
    assert model.active_adapters() == ["second"]
    assert_equal(eval_logits(model, BATCH), wanted["second"], "logits")
    assert trainable(model) == {f"{path}.deltas.second.s2ft_values" for path in deltas_of(model, "second")}


def test_switching(two):
    model, wanted, _ = two
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert_equal(eval_logits(model, BATCH), wanted[name], name)
        assert trainable(model) == {f"{path}.deltas.{name}.s2ft_values" for path in deltas_of(model, name)}


def test_both_at_once_add_up(two):
    model, _, _ = two
    model.set_adapter(["first", "second"])
    assert model.active_adapters() == ["first", "second"]
    expected = llama()
    with torch.no_grad():
        for name in ("first", "second"):
            for path, delta in deltas_of(model, name).items():
                expected.get_submodule(path).weight += delta.weight_delta()
    assert_close(eval_logits(model, BATCH), eval_logits(expected, BATCH), atol=1e-5, what="logits")
    merged = inlay.merge(model)
    for key, tensor in expected.state_dict().items():
        assert_close(merged.state_dict()[key], tensor, atol=1e-7, what=key)
    assert len(trainable(model)) == 8
    loss = model.train()(**BATCH).loss
    loss.backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


def test_both_at_once_train_as_merged_full_gradients(two):
    """Each adapter's gradient is the full gradient at its own entries, whatever the other adds."""
    model, _, _ = two
    merged_first = copy.deepcopy(model)
    merged_first.set_adapter(["first", "second"])
    full = inlay.merge(merged_first).train()
    for path in deltas_of(model, "first"):
        full.get_submodule(path).weight.requires_grad_(True)
    full(**BATCH).loss.backward()
    model.set_adapter(["first", "second"])
    model.train()(**BATCH).loss.backward()
    for name in ("first", "second"):
        for path, delta in deltas_of(model, name).items():
            wanted = full.get_submodule(path).weight.grad.index_select(1, delta.s2ft_indices)
            size = float(wanted.abs().max())
            assert_close(delta.s2ft_values.grad, wanted, atol=1e-5 * size, what=f"{name} on {path}")


def test_training_one_leaves_the_other(two):
    model, wanted, _ = two
    model.set_adapter("first")
    train(model.train(), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), [BATCH])
    assert not torch.equal(eval_logits(model, BATCH), wanted["first"])
    model.set_adapter("second")
    assert_equal(eval_logits(model, BATCH), wanted["second"], "second")


def test_saving_one_of_several(two):
    model, wanted, directory = two
    model.set_adapter("first")
    model.save_pretrained(directory / "again")
    loaded = inlay.load(llama(), directory / "again")
    assert_equal(eval_logits(loaded, BATCH), wanted["first"], "logits")
    model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match=r"wanted one active adapter to save, got \['first', 'second'\]"):
        model.save_pretrained(directory / "both")
    assert not (directory / "both").exists()


def test_disabled_and_deleted(two):
    model, wanted, _ = two
    base = inlay.tune(llama(), inlay.S2FT())  # the same fused blocks
    model.set_adapter("first")
    with inlay.disabled(model):
        assert_equal(eval_logits(model, BATCH), eval_logits(base, BATCH), "disabled")
    assert model.active_adapters() == ["first"]
    with pytest.raises(ValueError, match="'first' is active; set_adapter another one first"):
        model.delete_adapter("first")
    model.delete_adapter("second")
    assert not [key for key in model.state_dict() if "second" in key]
    with pytest.raises(ValueError, match=r"no adapter 'second'; there are \['first'\]"):
        model.set_adapter("second")
    assert_equal(eval_logits(model, BATCH), wanted["first"], "first")


def test_a_refused_switch_changes_nothing(two):
    model, wanted, _ = two
    with pytest.raises(ValueError, match=r"no adapter 'third'; there are \['first', 'second'\]"):
        model.set_adapter(["first", "third"])
    assert model.active_adapters() == ["second"]
    assert_equal(eval_logits(model, BATCH), wanted["second"], "logits")


def test_load_adapter_of_the_model(two):
    model, wanted, directory = two
    model.load_adapter(directory / "first", adapter_name="third")
    assert model.active_adapters() == ["third"]
    assert_equal(eval_logits(model, BATCH), wanted["first"], "logits")


def test_tuning_again_adds_an_adapter():
    model = one(1)
    wanted = eval_logits(model, BATCH)
    inlay.tune(model, inlay.S2FT(ratio=0.2, target_modules=["q_proj", "down_proj"]), adapter_name="more")
    assert model.active_adapters() == ["more"]
    base = inlay.tune(llama(), inlay.S2FT())
    assert_close(eval_logits(model, BATCH), eval_logits(base, BATCH), atol=1e-5, what="an untrained adapter")
    model.set_adapter("default")
    assert_equal(eval_logits(model, BATCH), wanted, "the first adapter")


@pytest.mark.parametrize("updates", [("in_place", "in_place"), ("in_place", "additive"), ("additive", "in_place")])
def test_in_place_shares_its_base_with_nobody(updates):
    """Refused before anything changes, also where the second adapter has linears of its own."""
    model = one(1, update=updates[0])
    wanted = eval_logits(model, BATCH)
    keys, active = list(model.state_dict()), model.active_adapters()
    method = inlay.S2FT(ratio=0.2, target_modules=["q_proj", "o_proj"], update=updates[1])
    with pytest.raises(ValueError, match='one adapter on a base tuned with update="in_place"'):
        inlay.tune(model, method, adapter_name="more")
    assert list(model.state_dict()) == keys and model.active_adapters() == active
    assert_equal(eval_logits(model, BATCH), wanted, "logits")
    inlay.tune(model, inlay.S2FT(target_modules=["q_proj"], update=updates[1]), adapter_name="elsewhere")


def test_in_place_adapters_of_different_linears():
    model = inlay.tune(llama(), inlay.S2FT(ratio=0.2, target_modules=["down_proj"], update="in_place"))
    inlay.tune(model, inlay.S2FT(ratio=0.2, target_modules=["o_proj"], update="in_place"), adapter_name="other")
    randomize(model, 0.1)
    randomize(model, 0.1, name="other")
    expected = llama()
    with torch.no_grad():
        for name in ("default", "other"):
            for path, delta in deltas_of(model, name).items():
                expected.get_submodule(path).weight += delta.weight_delta()
    model.set_adapter(["default", "other"])
    assert_close(eval_logits(model, BATCH), eval_logits(expected, BATCH), atol=1e-5, what="both")
    model.set_adapter("default")
    merged = inlay.merge(model)
    for path in deltas_of(model, "other"):  # the inactive one is out of the weights again
        assert_equal(merged.get_submodule(path).weight, llama().get_submodule(path).weight, path)


def test_additive_and_in_place_switch_between_each_other():
    """An in-place adapter that is switched off gives the base back, to the bit, on every linear."""
    model = one(1, update="in_place")
    inlay.tune(model, inlay.S2FT(ratio=0.2, target_modules=["q_proj"]), adapter_name="other")
    model.set_adapter("other")
    base = llama().state_dict()
    assert_state_equal({key: tensor for key, tensor in model.state_dict().items() if ".deltas." not in key}, base)


def test_gpt2_switches_in_place():
    family = BY_NAME["gpt2"]
    model = inlay.tune(family.build(), inlay.S2FT(ratio=0.2, update="in_place"))
    randomize(model, 0.1)
    wanted = eval_logits(model, BATCH)
    model.disable_adapters()
    assert_equal(eval_logits(model, BATCH), eval_logits(family.build(), BATCH), "base")
    model.enable_adapters()
    assert_equal(eval_logits(model, BATCH), wanted, "adapter")
