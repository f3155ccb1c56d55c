"""`make demo`: a real model learns to pronounce English, and every claim about it is checked.

The recipe is examples/pronounce.yaml, the same that `inlay train` runs. Figures are printed as
they are measured; a check that fails ends the demo with an error.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local
os.environ.setdefault("TQDM_DISABLE", "1")  # bars of loading say nothing here

import torch
from fetch import fetch
from plot import plot_curves
from task import ErrorRate, Word, error_rate, pronounce, split_words, text_loss
from transformers import TrainerCallback
from write_data import TRAIN_WORDS

import inlay
from inlay.cli.config import DATA_KEYS, MODEL_KEYS, build_base, build_method, load_config
from inlay.cli.models import load_model
from inlay.train import best_cpu_dtype, finetune

HERE = Path(__file__).parent
SAMPLES = 8
VERIFIED = 4  # prompts on which merged and exported models are compared
VALIDATION_WORDS = 40  # for the curve only: neither trained on nor among the 300
CURVE_POINTS = 5
# Without native bf16 a step takes much longer: fewer words, a higher error rate, the same time.
DEFAULT_WORDS = TRAIN_WORDS if best_cpu_dtype() == torch.bfloat16 else TRAIN_WORDS // 2
EXACT = 1e-3  # |logit difference| in float32: rounding of sums in another order, not another function


def main() -> None:
    args = parse_arguments()
    started = time.perf_counter()
    config = load_config(HERE.parent / "pronounce.yaml", [f"model={args.cache}/smollm2", *args.overrides])
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    fetch(config["model"])

    heading("Model and task")
    train, held_out, validation = words(args.words)
    load_base = partial(load_model, config["model"], config["gguf_file"], config["dtype"])
    model, tokenizer = load_base()
    print(
        f"SmolLM2-135M-Instruct, real weights, dequantized from the 4-bit {config['gguf_file']}\n"
        f"to {str(model.dtype).removeprefix('torch.')}, {torch.get_num_threads()} CPU threads.\n"
        f"Task: spell a word, answer with its ARPAbet phonemes (CMUdict, no stress marks). {len(train):,} words to\n"
        f"train on; {len(held_out)} others, held out, to measure on."
    )
    text = (HERE / "general.txt").read_text(encoding="utf-8")

    heading("Before")
    before, before_answers = measure(model, tokenizer, held_out)
    loss_before = text_loss(model, tokenizer, text)
    print(f"phoneme error rate: {before}")

    heading("Training")
    steps = -(-len(train) // config["per_device_train_batch_size"])
    curve = ErrorCurve(model, tokenizer, validation, steps)
    result = train_model(model, tokenizer, train, config, output / "adapter", curve)

    heading("After")
    after, after_answers = measure(model, tokenizer, held_out)
    loss_after = text_loss(model, tokenizer, text)
    print_samples(held_out, before_answers, after_answers)
    print(f"\nphoneme error rate before: {before}\nphoneme error rate after:  {after}")
    print(
        f"loss on general text (forgetting): {loss_before:.3f} before, {loss_after:.3f} after "
        f"({loss_after - loss_before:+.3f} nats per token)"
    )
    print(f"speed and memory: {result}")

    heading("The adapter elsewhere: merged, and in PEFT")
    prompts = [word.prompt for word in held_out[:VERIFIED]]
    check_merge(model, tokenizer, prompts, output)
    check_peft(model, tokenizer, prompts, output, load_base)

    rates = curve.rates | {result.steps: curve.rate()}
    plot_curves(output / "curves.png", result.losses, rates, base=before.rate, tuned=after.rate)
    print(f"\ncurves: {output}/curves.png; adapter: {output}/adapter; merged model: {output}/merged")
    seconds = time.perf_counter() - started
    print(f"time: {args.setup_seconds:.0f} s to set up, {seconds:.0f} s to run")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", default=".cache", help="folder for what is downloaded")
    parser.add_argument("--output", default="demo-output", help="folder for what is made")
    parser.add_argument("--words", type=int, default=DEFAULT_WORDS, help="words to train on (default: %(default)s)")
    parser.add_argument("--setup-seconds", type=float, default=0.0, help="what `make` measured")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of pronounce.yaml")
    return parser.parse_args()


def heading(title: str) -> None:
    print(f"\n== {title} " + "=" * (70 - len(title)), flush=True)


def words(train_size: int) -> tuple[list[Word], list[Word], list[Word]]:
    chosen, held_out = split_words(train_size + VALIDATION_WORDS)
    return chosen[VALIDATION_WORDS:], held_out, chosen[:VALIDATION_WORDS]


def measure(model: Any, tokenizer: Any, chosen: list[Word]) -> tuple[ErrorRate, list[str]]:
    answers = pronounce(model, tokenizer, chosen)
    return error_rate(chosen, answers), answers


class ErrorCurve(TrainerCallback):
    """Error rate on a few words at some points of the training."""

    def __init__(self, model: Any, tokenizer: Any, chosen: list[Word], steps: int) -> None:
        self.model, self.tokenizer, self.words, self.steps = model, tokenizer, chosen, steps
        self.every = max(1, steps // CURVE_POINTS)
        self.rates: dict[int, float] = {}

    def rate(self) -> float:
        return measure(self.model, self.tokenizer, self.words)[0].rate

    # At the beginning of a step, where Trainer's own clock for steps has not started yet.
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < self.steps:
            self.rates[state.global_step] = self.rate()
            self.model.train()


def train_model(
    model: Any, tokenizer: Any, train: list[Word], config: dict[str, Any], folder: Path, curve: ErrorCurve
) -> Any:
    options = {key: value for key, value in config.items() if key not in MODEL_KEYS | {"data", "eval_data"}}
    data_options = {key: options.pop(key) for key in DATA_KEYS & options.keys()}
    options |= {"output_dir": str(folder), "disable_tqdm": True}
    return finetune(
        model,
        tokenizer,
        [word.record() for word in train],
        method=build_method(options.pop("method")),
        base=build_base(options.pop("base", None)),
        callbacks=[curve],
        **data_options,
        **options,
    )


def print_samples(chosen: list[Word], before: list[str], after: list[str]) -> None:
    print(f"{'word':13} {'CMUdict':34} {'after':34} before")
    for word, old, new in list(zip(chosen, before, after, strict=True))[:SAMPLES]:
        print(f"{word.spelling:13} {' '.join(word.pronunciations[0]):34} {new:34} {old[:40]!r}")


def check_merge(model: Any, tokenizer: Any, prompts: list[str], output: Path) -> None:
    """The merged model, saved as a plain one, against base + adapter."""
    plain = inlay.merge(model)
    plain.save_pretrained(output / "merged")
    tokenizer.save_pretrained(output / "merged")
    dtype = str(model.dtype).removeprefix("torch.")
    found = inlay.verify(model, plain, prompts, tokenizer=tokenizer, max_new_tokens=8)
    print(f"merged against base + adapter, {dtype} (each rounds at its own place): {found}")


def check_peft(model: Any, tokenizer: Any, prompts: list[str], output: Path, load_base: Callable[[], Any]) -> None:
    """In float32, where equal means equal: merged against adapter, and PEFT with the exported LoRA against ours."""
    from peft import PeftModel

    inlay.export(model, output / "peft-lora", format="peft-lora")
    ours = inlay.load(load_base()[0].float(), output / "adapter")
    demand_equal("merged against base + adapter, float32", ours, inlay.merge(ours), tokenizer, prompts)
    theirs = PeftModel.from_pretrained(load_base()[0].float(), output / "peft-lora")
    demand_equal("PEFT with the exported LoRA against inlay, float32", ours, theirs, tokenizer, prompts)


def demand_equal(what: str, ours: Any, theirs: Any, tokenizer: Any, prompts: list[str]) -> None:
    found = inlay.verify(ours, theirs, prompts, tokenizer=tokenizer, max_new_tokens=8)
    print(f"{what}: {found}")
    if not (found.max_logit_diff <= EXACT and found.tokens_equal):
        raise SystemExit(f"demo: error: {what}: wanted equal answers, |logit difference| <= {EXACT}, got {found}")


if __name__ == "__main__":
    main()
