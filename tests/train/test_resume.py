"""Resuming from a checkpoint that lacks a part: an error unless asked for, where Trainer starts anew in silence."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from test_finetune import QUICK, RECORDS, build_model, build_tokenizer, tuned

import inlay
from inlay.train import finetune

OPTIONS = QUICK | {"max_steps": 6, "save_steps": 3, "save_strategy": "steps"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return finetune(tuned(), build_tokenizer(), RECORDS, output_dir=str(folder), **OPTIONS), folder / "checkpoint-3"


def resume(checkpoint, output, **options):
    return finetune(
        tuned(),
        build_tokenizer(),
        RECORDS,
        output_dir=str(output),
        resume_from_checkpoint=str(checkpoint),
        **(OPTIONS | options),
    )


@pytest.mark.parametrize(
    "gone, what",
    [("optimizer.pt", "optimizer"), ("scheduler.pt", "schedule"), ("trainer_state.json", "run")],
)
def test_a_part_is_missing(gone, what, run, tmp_path):
    _, checkpoint = run
    copied = tmp_path / "checkpoint-3"
    shutil.copytree(checkpoint, copied)
    (copied / gone).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-3 holds no state of the {what}.*fresh_optimizer=True"):
        resume(copied, tmp_path / "out")
    with pytest.raises(ValueError, match="holds no state of the"):  # the newest one, as True means
        finetune(tuned(), build_tokenizer(), RECORDS, output_dir=str(tmp_path), resume_from_checkpoint=True, **OPTIONS)


def test_all_there_is_exact_and_without_optimizer_is_another_run_if_asked(run, tmp_path):
    whole, checkpoint = run
    assert resume(checkpoint, tmp_path / "same").losses == whole.losses[3:]
    copied = tmp_path / "checkpoint-3"
    shutil.copytree(checkpoint, copied)
    (copied / "optimizer.pt").unlink()
    rest = resume(copied, tmp_path / "other", fresh_optimizer=True)
    assert len(rest.losses) == 3 and rest.losses[0] == whole.losses[3] and rest.losses[2] != whole.losses[5]


def test_save_only_model_leaves_nothing_to_resume(tmp_path):
    finetune(tuned(), build_tokenizer(), RECORDS, output_dir=str(tmp_path), save_only_model=True, **OPTIONS)
    with pytest.raises(ValueError, match="holds no state of the optimizer and the schedule"):
        resume(tmp_path / "checkpoint-3", tmp_path / "out")


def test_from_the_shell(run, tmp_path, capsys):
    from inlay.cli import main

    _, checkpoint = run
    copied = tmp_path / "checkpoint-3"
    shutil.copytree(checkpoint, copied)
    (copied / "optimizer.pt").unlink()
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "cat", "completion": "tac"}\n' * 4)
    lines = [f"model: {tmp_path / 'model'}", "method: s2ft", f"data: {tmp_path / 'data.jsonl'}", "use_cpu: true"]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, f"output_dir: {tmp_path / 'out'}", "max_steps: 4"]))
    arguments = ["train", str(tmp_path / "c.yaml"), f"resume_from_checkpoint={copied}"]
    assert main(arguments) == 2
    assert "holds no state of the optimizer" in capsys.readouterr().err


def test_trainer_resumes_a_head_exactly(tmp_path):
    """A classifier's head is in the checkpoint, and goes on where it was."""
    from families import BY_NAME, class_batch

    def trainer(folder, **options):
        model = inlay.tune(BY_NAME["bert"].build(), inlay.S2FT(ratio=0.2))
        data = [{k: v[i] for k, v in class_batch(seed).items()} for seed in range(4) for i in range(3)]
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=3, learning_rate=1e-2,
            report_to=[], use_cpu=True, logging_steps=1, **options,
        )  # fmt: skip
        return transformers.Trainer(model=model, args=arguments, train_dataset=data)

    straight, resumed = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    pairs = zip(straight.model.named_parameters(), resumed.model.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        assert torch.equal(one, other), name
    start = BY_NAME["bert"].build().classifier.weight
    assert float((straight.model.classifier.weight - start).abs().max()) > 1e-2
