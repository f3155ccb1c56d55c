"""transformers' Trainer, unmodified, on tuned models: training, accumulation, exact resume, the best checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparing import assert_close, assert_equal, assert_state_equal
from families import BY_NAME, eval_logits, llama, text_batch
from oracle import deltas_of
from transformers import Trainer, TrainerCallback, TrainingArguments

import inlay

UPDATES = ["additive", "in_place"]
STEPS = 6


def samples(family=None, count=24):
    """Single samples, as a dataset gives them."""
    rows = []
    for seed in range(count // 3):
        batch = text_batch(seed) if family is None else family.batch(seed)
        rows += [{key: value[i] for key, value in batch.items()} for i in range(3)]
    return rows


def stack(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def tuned_model(update="additive", **options):
    return inlay.tune(llama(), inlay.S2FT(ratio=0.2, update=update), **options)


def trainer(model, directory, data=None, **changes):
    arguments = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**(arguments | changes)),
        train_dataset=samples() if data is None else data,
        eval_dataset=samples(count=6),
        data_collator=stack,
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def values(model):
    return {path: delta.s2ft_values.detach().clone() for path, delta in deltas_of(model).items()}


class Stop(TrainerCallback):
    """Ends training after a step, as an interruption would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_resume_is_bit_exact(update, optimizer, tmp_path):
    """Interrupted after step 3 and resumed by a new process's model: losses and values of the uninterrupted run."""
    whole = trainer(tuned_model(update), tmp_path / "whole", optim=optimizer)
    whole.train()
    assert len(losses(whole)) == STEPS == len(set(losses(whole)))

    first = trainer(tuned_model(update), tmp_path / "part", save_strategy="steps", save_steps=3, optim=optimizer)
    first.add_callback(Stop(3))
    first.train()
    second = trainer(tuned_model(update), tmp_path / "part", optim=optimizer)
    second.train(resume_from_checkpoint=True)
    assert losses(first)[:3] == losses(whole)[:3]
    assert losses(second) == losses(whole)
    for path, wanted in values(whole.model).items():
        assert_equal(values(second.model)[path], wanted, path)
    assert_equal(eval_logits(second.model, text_batch(0)), eval_logits(whole.model, text_batch(0)), "logits")


@pytest.mark.parametrize("update", UPDATES)
def test_resume_needs_the_checkpoint(update, tmp_path):
    """The test above could not pass by chance: without the checkpoint's values the losses differ."""
    whole = trainer(tuned_model(update), tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint)
    save_file({k: v * 1.001 if v.is_floating_point() else v for k, v in tensors.items()}, checkpoint)
    second = trainer(tuned_model(update), tmp_path / "again")
    second.train(resume_from_checkpoint=str(checkpoint.parent))
    assert losses(second)[3:] != losses(whole)[3:]


@pytest.mark.parametrize("update", UPDATES)
def test_checkpoints_are_adapters(update, tmp_path):
    run = trainer(tuned_model(update), tmp_path, save_strategy="steps", save_steps=3)
    run.train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= set(names(checkpoint))
    size = (checkpoint / "model.safetensors").stat().st_size
    assert size < 0.5 * sum(p.numel() * p.element_size() for p in llama().parameters())
    loaded = inlay.load(llama(), checkpoint)
    assert_equal(eval_logits(loaded, text_batch(0)), eval_logits(run.model, text_batch(0)), "logits")


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@pytest.mark.parametrize("update", UPDATES)
def test_the_best_checkpoint_is_loaded_at_the_end(update, tmp_path):
    """Best is called what has the largest loss, so that it is not the last step."""
    run = trainer(
        tuned_model(update),
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.03,
        load_best_model_at_end=True,
        greater_is_better=True,
        max_steps=4,
    )
    run.train()
    history = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = max(history, key=history.get)
    assert best != 4 and run.state.best_metric == history[best]
    assert run.evaluate()["eval_loss"] == history[best]
    loaded = inlay.load(llama(), tmp_path / f"checkpoint-{best}")
    assert_state_equal(
        {k: v for k, v in run.model.state_dict().items() if ".deltas." in k},
        {k: v for k, v in loaded.state_dict().items() if ".deltas." in k},
    )
    assert_equal(eval_logits(run.model, text_batch(0)), eval_logits(loaded, text_batch(0)), "logits")


@pytest.mark.parametrize("update", UPDATES)
def test_accumulation_equals_a_larger_batch(update, tmp_path):
    """Samples have different numbers of supervised tokens: only num_items_in_batch makes these equal."""
    runs = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        run = trainer(
            tuned_model(update), tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        run.train()
        runs.append(run)
    for run in runs[1:]:
        assert_close(torch.tensor(losses(run)), torch.tensor(losses(runs[0])), atol=1e-4, what="losses")
        for path, wanted in values(runs[0].model).items():
            assert_close(values(run.model)[path], wanted, atol=1e-5, what=path)


@pytest.mark.parametrize("update", UPDATES)
def test_equals_an_eager_trainer_run(update, tmp_path):
    """The same Trainer on a tuned model without fused parts: the fused loss in it honours all that Trainer passes."""
    fused = trainer(tuned_model(update), tmp_path)
    eager = trainer(tuned_model(update, fused_loss=False, fused_blocks=False), tmp_path)
    fused.train(), eager.train()
    assert fused.model._loss_function.last is not None
    assert_close(torch.tensor(losses(fused)), torch.tensor(losses(eager)), atol=1e-4, what="losses")
    for path, wanted in values(eager.model).items():
        assert_close(values(fused.model)[path], wanted, atol=1e-5, what=path)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("update", UPDATES)
def test_gradient_checkpointing_changes_nothing(update, reentrant, tmp_path):
    plain = trainer(tuned_model(update), tmp_path)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    recomputed = trainer(tuned_model(update), tmp_path, **options)
    plain.train(), recomputed.train()
    assert_close(torch.tensor(losses(recomputed)), torch.tensor(losses(plain)), atol=1e-4, what="losses")
    for path, wanted in values(plain.model).items():
        assert_close(values(recomputed.model)[path], wanted, atol=1e-5, what=path)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "t5", "mixtral"])
def test_other_families_train_and_resume(name, tmp_path):
    family = BY_NAME[name]

    def run(directory, **changes):
        model = inlay.tune(family.build(), inlay.S2FT(ratio=0.2))
        return trainer(model, directory, data=samples(family), **changes)

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    second = run(tmp_path / "second")
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(second) == losses(whole) and len(losses(whole)) == STEPS
    for path, wanted in values(whole.model).items():
        assert bool(wanted.any())
        assert_equal(values(second.model)[path], wanted, path)
