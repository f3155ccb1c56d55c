"""Runs whose set of trained weights changes: killed anywhere they go on as if nothing had happened."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import assert_equal
from families import llama, text_batch
from test_finetune import QUICK, RECORDS, build_model, build_tokenizer

import inlay
from inlay.train import finetune

OPTIONS = QUICK | {"max_steps": 8, "save_steps": 1, "save_strategy": "steps"}
METHODS = {
    "full": inlay.Full(),
    "lisa": inlay.LISA(layers=1, every=2),
    "lisa-blocks": inlay.LISA(layers=1, every=3, embeddings=False),
    "hft": inlay.HFT(redraw_every=3),
    "green-trainer": inlay.GreenTrainer(rho=0.6, every=3, cost="flops"),
}


def tuned(name, dtype=torch.float32):
    return inlay.tune(build_model().to(dtype), copy.deepcopy(METHODS[name]))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_goes_on_bit_for_bit(name, dtype, tmp_path):
    straight = tuned(name, dtype)
    losses = finetune(straight, build_tokenizer(), RECORDS, output_dir=str(tmp_path / "run"), **OPTIONS).losses
    wanted = weights(straight)
    for step in (1, 3, 4, 6):
        again = tuned(name, dtype)
        resumed = finetune(
            again,
            build_tokenizer(),
            RECORDS,
            output_dir=str(tmp_path / f"from-{step}"),
            resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"),
            **(OPTIONS | {"save_strategy": "no"}),
        )
        assert resumed.losses == losses[step:], step
        for key, value in weights(again).items():
            assert_equal(value, wanted[key], f"{key} from step {step}")


@pytest.mark.parametrize("optimizer", ["inlay", "torch", "foreach", "sgd"])
@pytest.mark.parametrize("name", ["lisa", "hft", "green-trainer"])
def test_a_bare_loop_with_any_optimizer(name, optimizer, tmp_path):
    """state_dict of the model and of the optimizer are all it takes."""

    def made():
        model = inlay.tune(llama(num_hidden_layers=4), copy.deepcopy(METHODS[name])).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        kinds = {
            "inlay": lambda: inlay.optim.AdamW(parameters, lr=1e-3),
            "torch": lambda: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
            "foreach": lambda: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
            "sgd": lambda: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
        }
        return model, kinds[optimizer]()

    def train(model, stepper, seeds):
        losses = []
        for seed in seeds:
            stepper.zero_grad()
            for part in range(2):  # micro-batches
                loss = model(**text_batch(10 * seed + part)).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            stepper.step()
            losses.append(loss.item())
        return losses

    model, stepper = made()
    losses = train(model, stepper, range(9))
    for kill in (1, 2, 5):
        first, halfway = made()
        begun = train(first, halfway, range(kill))
        torch.save({"model": first.state_dict(), "optimizer": halfway.state_dict()}, tmp_path / "state.pt")
        second, again = made()
        held = torch.load(tmp_path / "state.pt")
        second.load_state_dict(held["model"])
        again.load_state_dict(held["optimizer"])
        assert begun + train(second, again, range(kill, 9)) == losses, kill
        for (key, one), other in zip(model.named_parameters(), second.parameters(), strict=True):
            assert_equal(other, one, key)


def test_a_copy_goes_its_own_way():
    """A deep copy has its own schedule: stepping one leaves the other where it is."""
    model = inlay.tune(llama(num_hidden_layers=4), inlay.LISA(layers=1, every=1)).train()
    other = copy.deepcopy(model)
    for each, count in ((model, 3), (other, 1)):
        optimizer = inlay.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-3)
        for seed in range(count):
            optimizer.zero_grad()
            each(**text_batch(seed)).loss.backward()
            optimizer.step()
    taken = [int(each.inlay_schedules["default"].steps) for each in (model, other)]
    assert taken == [3, 1]
    again = torch.load(_saved(model), weights_only=False)
    assert int(again.inlay_schedules["default"].steps) == 3


def _saved(model):
    import io

    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    return held


def test_switching_adapters_changes_schedules():
    model = inlay.tune(llama(num_hidden_layers=4), inlay.LISA(layers=1, every=1)).train()
    inlay.tune(model, inlay.LISA(layers=2, every=1, embeddings=False), adapter_name="two").train()
    model(**text_batch(0)).loss.backward()
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    model.set_adapter("default")
    model(**text_batch(0)).loss.backward()
    inside = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and ".layers." in name}
    assert len(inside) == 1


def test_a_schedule_chooses_again_when_its_adapter_comes_back():
    """set_adapter makes all of an adapter trainable; the schedule narrows that down, also the second time."""
    model = inlay.tune(llama(num_hidden_layers=4), inlay.LISA(layers=1, every=5, embeddings=False)).train()
    inlay.tune(model, inlay.HFT(), adapter_name="other").train()
    seen = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        model(**text_batch(0)).loss.backward()
        seen.append({key for key, p in model.named_parameters() if p.requires_grad})
    assert seen[0] == seen[2] != seen[1]
    assert len({key.split(".")[2] for key in seen[0]}) == 1


def test_a_schedule_that_is_off_counts_no_steps():
    model = inlay.tune(llama(), inlay.LoFiT(stage="gates", l1_lambda=0.1)).train()
    inlay.tune(model, inlay.LoFiT(stage="gates"), adapter_name="other").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for name, steps in (("default", 2), ("other", 3)):
        model.set_adapter(name)
        for seed in range(steps):
            optimizer.zero_grad()
            model(**text_batch(seed)).loss.backward()
            optimizer.step()
    assert [int(model.inlay_schedules[name].steps) for name in ("default", "other")] == [2, 3]


@pytest.mark.parametrize("method", [inlay.LISA(layers=1, every=1), inlay.LoFiT(stage="gates")], ids=["lisa", "gates"])
def test_what_is_loaded_not_to_train_stays_frozen(method, tmp_path):
    model = inlay.tune(llama(), method).train()
    optimizer = inlay.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**text_batch(0)).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "first")
    loaded = inlay.load(llama(), tmp_path / "first", trainable=False).train()
    loaded(**text_batch(0))
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "second")  # the point of its schedule with it
    again = inlay.load(llama(), tmp_path / "second").train()
    assert int(again.inlay_schedules["default"].steps) == 1
    loaded.set_adapter("default")
    loaded(**text_batch(0))
    assert any(p.requires_grad for p in loaded.parameters())
