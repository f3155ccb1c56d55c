"""``model.to(dtype)`` after ``tune`` moves the base: trainables, their gradients and optimizer states stay fp32."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import assert_close, assert_equal, assert_series
from families import eval_logits, llama, text_batch
from oracle import deltas_of, randomize, train

import inlay

METHODS = {
    "s2ft": (lambda: inlay.S2FT(ratio=0.3), None),
    "s2ft out": (lambda: inlay.S2FT(ratio=0.3, side="out"), None),
    "s2ft in place": (lambda: inlay.S2FT(ratio=0.3, update="in_place"), None),
    "lora": (lambda: inlay.LoRA(r=3), None),
    "s2ft nf4": (lambda: inlay.S2FT(ratio=0.3), "nf4"),
    "s2ft exact": (lambda: inlay.S2FT(ratio=0.3, keep="exact"), "nf4"),
    "lora int8": (lambda: inlay.LoRA(r=3), "int8"),
}
MOVES = {
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "device and dtype": lambda model: model.to("cpu", torch.bfloat16),
    "like a tensor": lambda model: model.to(torch.zeros(1, dtype=torch.bfloat16)),
    "parts": lambda model: [part.to(torch.bfloat16) for part in (model.model, model.lm_head)],
}


@pytest.fixture(params=METHODS)
def tuned(request):
    method, base = METHODS[request.param]
    model = inlay.tune(llama(), method(), base=base)
    train(model, torch.optim.AdamW(trainables(model).values(), lr=1e-2), [text_batch(0), text_batch(1)])
    return model


def trainables(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("move", MOVES)
def test_trainables_stay_as_they_are(tuned, move):
    tuned(**text_batch(0)).loss.backward()
    before = {name: (p, p.detach().clone(), p.grad.clone()) for name, p in trainables(tuned).items()}
    MOVES[move](tuned)
    assert tuned.model.embed_tokens.weight.dtype in (torch.bfloat16, torch.float16)
    assert set(trainables(tuned)) == set(before)
    for name, (parameter, value, gradient) in before.items():
        moved = trainables(tuned)[name]
        assert moved is parameter  # what the optimizer holds
        assert_equal(moved, value, name)
        assert_equal(moved.grad, gradient, f"gradient of {name}")


@pytest.mark.parametrize("move", ["to bfloat16", "half"])
def test_it_computes_what_tuning_the_moved_base_computes(tuned, move):
    """And goes on training, with the optimizer made before the move."""
    optimizer = torch.optim.AdamW(trainables(tuned).values(), lr=1e-3)
    train(tuned, optimizer, [text_batch(2)])
    before = eval_logits(tuned, text_batch(0))
    MOVES[move](tuned)
    after = eval_logits(tuned, text_batch(0))
    assert_close(after, before, atol=0.2 * float(before.abs().max()))
    tuned.float()
    assert_close(eval_logits(tuned, text_batch(0)), after, atol=0.2 * float(after.abs().max()))
    MOVES[move](tuned)
    losses = train(tuned, optimizer, [text_batch(0)] * 4)
    assert losses[-1] < losses[0]
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())


def test_a_disabled_adapter_is_the_moved_base():
    """Also where the in-place form keeps the original values."""
    for method in (inlay.S2FT(ratio=0.3, update="in_place"), inlay.S2FT(ratio=0.3)):
        tuned = inlay.tune(llama(), method, fused_blocks=False)
        train(tuned, torch.optim.AdamW(trainables(tuned).values(), lr=1e-2), [text_batch(0)])
        tuned.to(torch.bfloat16).float()
        with inlay.disabled(tuned):
            ours = eval_logits(tuned, text_batch(0))
        assert_equal(ours, eval_logits(llama().to(torch.bfloat16).float(), text_batch(0)), "logits")


def test_merging_and_saving_after_a_move(tuned, tmp_path):
    values = {name: p.detach().clone() for name, p in trainables(tuned).items()}
    tuned.to(torch.bfloat16)
    tuned.save_pretrained(tmp_path)
    again = copy.deepcopy(tuned)
    for parameter in trainables(again).values():
        parameter.data.zero_()
    again.hotswap_adapter(str(tmp_path))
    for name, parameter in trainables(again).items():
        assert_equal(parameter, values[name], name)
    merged = inlay.merge(tuned)
    assert merged.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


def test_double_and_back(tuned):
    wanted = eval_logits(tuned, text_batch(0))
    tuned.double()
    if not any(p.dtype in (torch.uint8, torch.int8) for p in tuned.parameters()):
        assert_close(eval_logits(tuned, text_batch(0)), wanted, atol=1e-4)
    tuned.float()
    assert all(p.dtype == torch.float32 for p in trainables(tuned).values())
    assert_close(eval_logits(tuned, text_batch(0)), wanted, atol=1e-4)


def test_meta_and_back(tuned):
    """A move between devices that keeps dtypes, as far as there is another device here."""
    delta = next(iter(deltas_of(tuned).values()))
    dtypes = {name: t.dtype for name, t in delta.state_dict().items()}
    delta.to("meta")
    assert {name: t.dtype for name, t in delta.state_dict().items()} == dtypes
    assert all(t.device.type == "meta" for t in delta.state_dict().values())


def test_under_peft():
    from peft import LoraConfig, get_peft_model

    from inlay.integrations.peft import S2FTConfig, accelerate_lora

    model = get_peft_model(llama(), S2FTConfig(ratio=0.3))
    before = {name: p.detach().clone() for name, p in trainables(model).items()}
    model.to(torch.bfloat16)
    for name, parameter in trainables(model).items():
        assert_equal(parameter, before[name], name)
    optimizer = torch.optim.AdamW(trainables(model).values(), lr=1e-2)
    losses = train(model, optimizer, [text_batch(0)] * 3)
    assert losses[-1] < losses[0]
    model.add_adapter("other", S2FTConfig(ratio=0.2))
    model.half().set_adapter("other")
    model(**text_batch(0)).loss.backward()
    lora = get_peft_model(llama(), accelerate_lora(LoraConfig(r=2, target_modules=["q_proj"]))).to(torch.bfloat16)
    assert {p.dtype for p in trainables(lora).values()} == {torch.bfloat16}  # PEFT's own rule, which PEFT's layer runs
    lora(**text_batch(0)).loss.backward()


def test_a_trainer_that_evaluates_in_16_bits(tmp_path):
    """bf16_full_eval moves the model; training goes on from the same values."""
    from transformers import Trainer, TrainingArguments

    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.3))
    randomize(tuned, 0.05)
    before = {name: p.detach().clone() for name, p in trainables(tuned).items()}
    rows = [{key: value[0] for key, value in text_batch(seed, rows=1).items()} for seed in range(2)]
    arguments = TrainingArguments(str(tmp_path), bf16_full_eval=True, report_to=[], use_cpu=True)
    result = Trainer(tuned, arguments, eval_dataset=rows).evaluate()
    assert tuned.model.embed_tokens.weight.dtype == torch.bfloat16 and result["eval_loss"] > 0
    for name, parameter in trainables(tuned).items():
        assert_equal(parameter, before[name], name)


def test_the_series_of_losses_is_that_of_a_base_moved_before():
    """Moving a base and its adapter, or tuning the moved base: the same."""
    first = inlay.tune(llama(), inlay.S2FT(ratio=0.3)).to(torch.bfloat16)
    second = inlay.tune(llama().to(torch.bfloat16), inlay.S2FT(ratio=0.3))
    series = [
        train(model, torch.optim.AdamW(trainables(model).values(), lr=1e-2), [text_batch(s) for s in range(4)])
        for model in (first, second)
    ]
    assert_series(series[0], series[1], rtol=0.0)
