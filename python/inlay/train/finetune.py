"""`inlay.finetune`: records in, adapter out."""

from __future__ import annotations

import dataclasses
import inspect
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from ..coverage import tuned_line
from ..data import Collator, TrainingData, check_samples_stay_apart, prepare, show_mask
from ..data.formats import RecordSource
from ..hardware import dtype_line
from ..integrations.padding_free import PaddingFree, why_shapes_matter
from ..nn.head import FusedCausalLoss
from ..schedules import active_schedules
from ..state import require_state, state_of
from ..tune import tune
from .arguments import training_arguments as build_arguments
from .expected import expected_peak
from .fits import check_data_fits, warn_if_generation_goes_on
from .frozen_cache import caching, check_cacheable
from .memory import PeakMemory
from .preflight import Preflight
from .processes import check_processes_agree
from .trainer import EIGHT_BIT, Trainer


@dataclass
class FinetuneResult:
    """What a run did. Speed counts input tokens that are not padding, over time spent in steps."""

    losses: list[float]  # of the optimizer steps of this call, in order
    tokens_per_second: float
    padding_fraction: float
    peak_memory_bytes: int | None  # above the loaded model; None where the system cannot tell
    steps: int
    output_dir: str | None
    seconds: float = 0.0
    eval_losses: dict[int, float] = field(default_factory=dict)  # optimizer step -> loss on eval_data
    expected_memory_bytes: int | None = None  # the same peak as inlay.estimate has it; None where it cannot tell

    def __str__(self) -> str:
        memory = "unknown" if self.peak_memory_bytes is None else f"{self.peak_memory_bytes / 2**20:,.0f} MiB"
        if self.expected_memory_bytes is not None:
            memory += f" (estimated for this run: {self.expected_memory_bytes / 2**20:,.0f})"
        return (
            f"{self.steps} steps in {self.seconds:.1f} s: {self.tokens_per_second:,.0f} tokens/s, "
            f"{self.padding_fraction:.1%} padding, peak memory {memory} above the loaded model"
        )


def finetune(
    model: Any,
    tokenizer: Any,
    data: RecordSource | TrainingData,
    *,
    method: Any = None,
    base: Any = None,
    compute: str | None = None,
    eval_data: RecordSource | TrainingData | None = None,
    max_length: int = 1024,
    train_on_inputs: bool = False,
    chat_template: bool | None = None,
    packing: bool = False,
    padding_free: bool | str | None = None,
    cache_frozen: bool = False,
    data_folder: str | Path | None = None,
    preflight: bool = True,
    fresh_optimizer: bool = False,
    callbacks: list[Any] | None = None,
    **training_arguments: Any,
) -> FinetuneResult:
    """Fine-tune a causal language model on records.

    Args:
        model: a model from `inlay.tune`, or a plain one together with `method`.
        tokenizer: its tokenizer.
        data: a .json or .jsonl path, a list of records, or what `inlay.data.prepare` returned.
            Formats: see `inlay.data.formats`.
        method: what to train, for a model that is not tuned yet: `inlay.S2FT(ratio=0.03)`.
        base: quantize such a model first: "nf4", "fp4", "int8" or an `inlay.BaseConfig`.
        compute: "int8" multiplies such a model's frozen weights in 8 bits, see `inlay.tune`.
        eval_data: records to evaluate on; with an `eval_strategy`, during training, else at the end.
        max_length: longer samples are cut, and counted.
        train_on_inputs: put loss on prompts too, not on completions only.
        chat_template: None uses the tokenizer's template where it has one; False joins prompt and
            completion as they are.
        packing: put several samples in a row of `max_length` tokens, none of which sees another (tried before
            training). Saves the padding of samples of unequal length.
        padding_free: drop the padding of batches before the first block and run samples by their lengths; the loss
            stays the same. "auto" does so where the model is proven to keep them apart and inlay's attention runs;
            True also where masks do it, of the square of a batch's tokens; False leaves padding in. None is the model's
            own setting, "auto" unless `model.set_padding_free` changed it. Packed rows have no padding.
        cache_frozen: keep what enters the first trained block in a file of the output_dir, and start there in later
            epochs; its size is printed first. For models whose lowest blocks are frozen, and draw no random numbers.
        data_folder: keep the encoded samples in files there instead of in memory; what is there already from the same
            data file is used again.
        preflight: run the longest batch before the first step, so that one too long for the memory shows at once.
        fresh_optimizer: go on from a checkpoint that lacks the state of its optimizer or schedule (`save_only_model`
            leaves it out), with new ones; otherwise that is an error.
        callbacks: transformers TrainerCallbacks.
        **training_arguments: names of transformers.TrainingArguments. `optim="adamw_8bit"` is inlay's AdamW with 8-bit
            states; without `optim` its fp32 ones are used. Without `output_dir` nothing is written.
            `resume_from_checkpoint` takes a path, or True for the newest one.

    Raises:
        TypeError: an unknown argument, or a model that cannot be trained this way.
        ValueError: no supervised token in the data or in a batch; packing, or padding_free=True, with an attention
            that mixes samples; cache_frozen with dropout, a schedule or a trained first block;
            processes that chose different channels; a checkpoint without what it takes to go on exactly.
        RuntimeError, FloatingPointError: a missing or non-finite gradient after the first step; a
            non-finite loss.
    """
    resume = training_arguments.pop("resume_from_checkpoint", None)
    arguments = _training_arguments(training_arguments)
    if resume and not fresh_optimizer:
        check_resumable(resume, arguments.output_dir)
    model = _tuned(model, method, base, compute)
    if active_schedules(model) and arguments.ddp_find_unused_parameters is None:
        arguments.ddp_find_unused_parameters = True  # what trains changes, and DDP counts gradients
    options = {"max_length": max_length, "train_on_inputs": train_on_inputs, "chat_template": chat_template}
    with arguments.main_process_first() if data_folder is not None else nullcontext():  # the others find it done
        train_data = _prepared(data, tokenizer, options | {"folder": data_folder})
    held_out = None if eval_data is None else _prepared(eval_data, tokenizer, options)
    rooms = [check_data_fits(model, prepared) for prepared in (train_data, held_out) if prepared is not None]
    widest = min((room for room in rooms if room is not None), default=None)
    warn_if_generation_goes_on(model, tokenizer, train_data)
    if packing:
        check_samples_stay_apart(model)
        train_data = train_data.pack(max_length)
    unpacked = [each for each in (train_data, held_out) if each is not None and not each.packed]
    states = check_cacheable(model, arguments, train_data) if cache_frozen else None
    if states is not None:
        if not training_arguments.get("output_dir"):
            raise ValueError(
                "cache_frozen=True wants an output_dir to keep hidden states in, got none; pass output_dir"
            )
        train_data = dataclasses.replace(train_data, numbered=True)
        arguments.remove_unused_columns = False  # numbers are for us, not for the model
    with padding_as(model, arguments, padding_free, unpacked) as (is_dropped, lost):
        collator = Collator.for_model(model, tokenizer, widest, mask=cache_frozen or is_dropped)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=train_data,
            eval_dataset=held_out,
            data_collator=collator,
            processing_class=tokenizer,
            callbacks=callbacks,
            pad_token_id=collator.pad_token_id,
            inlay_optimizer=training_arguments.get("optim", EIGHT_BIT[0]) in EIGHT_BIT,
        )
        if preflight and arguments.world_size == 1:
            trainer.add_callback(Preflight(trainer))
        if trainer.is_world_process_zero():
            _announce(model, tokenizer, train_data, held_out, train_on_inputs)
            print(f"inlay: padding: {lost}")
        with nullcontext() if states is None else caching(trainer, arguments.output_dir, states):
            return run(trainer, save="output_dir" in training_arguments, resume_from_checkpoint=resume)


def run(trainer: Trainer, *, save: bool, resume_from_checkpoint: str | bool | None = None) -> FinetuneResult:
    """Train, measure, evaluate, save."""
    if trainer.args.world_size > 1:
        check_processes_agree(trainer.model)
    expected = expected_peak(trainer)
    memory = PeakMemory(trainer.args.device)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    peak = memory.bytes()
    if trainer.eval_dataset is not None and trainer.args.eval_strategy == "no":
        trainer.evaluate()
    tokens, padding = trainer.over_processes(trainer.tokens), trainer.over_processes(trainer.padding)
    result = FinetuneResult(
        losses=trainer.losses,
        tokens_per_second=tokens / max(trainer.meter.seconds, 1e-9),
        padding_fraction=padding / max(padding + tokens, 1),
        peak_memory_bytes=peak,
        steps=len(trainer.losses),
        output_dir=trainer.args.output_dir if save else None,
        seconds=trainer.meter.seconds,
        eval_losses={e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e},
        expected_memory_bytes=expected,
    )
    if save:
        trainer.save_model()
        trainer.save_state()
    if trainer.is_world_process_zero():
        if save:
            _write_record(trainer, result)
        print(f"inlay: {result}")
    return result


@contextmanager
def padding_as(
    model: Any, arguments: Any, padding_free: bool | str | None, unpacked: list[TrainingData]
) -> Iterator[tuple[bool, str]]:
    """Within this context ``padding_free`` is the model's setting, or what keeps a run right. Yields whether padding is
    dropped from ``unpacked``, and a line on it.

    Raises:
        ValueError: ``padding_free=True`` where samples are not proven to stay apart in one row.
    """
    setting = require_state(model, "finetune").padding_free
    before = setting.mode
    setting.set(before if padding_free is None else padding_free)
    try:
        yield _padding(model, arguments, setting, unpacked)
    finally:
        setting.set(before)


def _padding(model: Any, arguments: Any, setting: PaddingFree, unpacked: list[TrainingData]) -> tuple[bool, str]:
    if not unpacked:
        return False, "none: rows are packed"
    if setting.mode is not False and (asked := _minds_shapes(arguments)) is not None:
        if setting.mode is True:
            raise ValueError(f"padding_free=True: rows of another shape do not go with {asked}; leave one of them out")
        setting.set(False)
        return False, f"stays, because of {asked}"
    longest = max(max(each.lengths, default=0) for each in unpacked)
    reason = why_shapes_matter(model, {}) or setting.why_not(model, longest)
    return reason is None, f"stays: {reason}" if reason is not None else f"dropped: {setting.manner(model, longest)}"


def _minds_shapes(arguments: Any) -> str | None:
    if arguments.torch_compile:
        return "torch_compile: every batch would be compiled anew"
    if arguments.neftune_noise_alpha is not None:
        return "neftune_noise_alpha, whose noise is scaled by the padded length"
    return None


def check_resumable(resume: str | bool, output_dir: str) -> None:
    """ValueError if the checkpoint to resume from lacks the state of the optimizer, the schedule or the run.

    transformers' Trainer starts new ones then, without a word.
    """
    found = get_last_checkpoint(output_dir) if resume is True else str(resume)
    if found is None or not Path(found).is_dir():
        return  # which Trainer says
    names = [path.name for path in Path(found).iterdir()]
    wanted = {"optimizer": "optimizer", "schedule": "scheduler", "run": "trainer_state"}
    missing = [what for what, start in wanted.items() if not any(name.startswith(start) for name in names)]
    if any(name.startswith("global_step") for name in names):  # DeepSpeed's folder holds both
        missing = [what for what in missing if what == "run"]
    if missing:
        raise ValueError(
            f"{found} holds no state of the {' and the '.join(missing)}, so that training cannot go on where it was; "
            "resume from a complete checkpoint, or pass fresh_optimizer=True to go on with new ones"
        )


def _training_arguments(given: dict[str, Any]) -> transformers.TrainingArguments:
    return build_arguments(known=inspect.signature(finetune).parameters, **given)


def _tuned(model: Any, method: Any, base: Any, compute: str | None) -> Any:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"finetune trains decoder-only language models, got {type(model).__name__} (encoder-decoder); "
            "call inlay.tune and give the result to transformers' Seq2SeqTrainer"
        )
    tuned = state_of(model) is not None
    if tuned and (method is not None or base is not None or compute is not None):
        raise ValueError(
            "the model is tuned already; leave method, base and compute out, or start from the plain model"
        )
    if not tuned and method is None:
        raise ValueError(
            "wanted a tuned model or a method, got a plain model and no method; "
            "pass method=inlay.S2FT(ratio=0.03), or call inlay.tune first"
        )
    return model if tuned else tune(model, method, base=base, compute=compute)


def _prepared(data: RecordSource | TrainingData, tokenizer: Any, options: dict[str, Any]) -> TrainingData:
    return data if isinstance(data, TrainingData) else prepare(data, tokenizer, **options)


def _announce(
    model: Any, tokenizer: Any, data: TrainingData, held_out: TrainingData | None, train_on_inputs: bool
) -> None:
    """What is about to be trained on what: the questions a run that went wrong raises afterwards."""
    print(f"inlay: data: {data.report}")
    if held_out is not None:
        print(f"inlay: eval data: {held_out.report}")
    print(f"inlay: first sample, supervised parts in [[ ]]:\n{show_mask(tokenizer, data[0])}")
    whole = train_on_inputs or data.report.format == "text"
    print(f"inlay: loss on {'every token' if whole else 'completions only'}, {_loss_in_force(model)}")
    print(f"inlay: tuned: {tuned_line(model)}")
    if (line := dtype_line(model.dtype, model.device.type)) is not None:
        print(f"inlay: dtype: {line}")
    model.print_trainable_parameters()


def _loss_in_force(model: Any) -> str:
    loss = getattr(model, "_loss_function", None)
    fused = isinstance(loss, FusedCausalLoss)
    return "fused linear cross-entropy (logits are not kept)" if fused else "the model's own loss"


def _write_record(trainer: Trainer, result: FinetuneResult) -> None:
    """inlay_run.json: what it takes to repeat the run."""
    record = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "arguments": trainer.args.to_dict(),
        "data": vars(trainer.train_dataset.report),
        "data_sha256": trainer.train_dataset.sha256(),
        "result": vars(result),
    }
    path = Path(trainer.args.output_dir) / "inlay_run.json"
    path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
