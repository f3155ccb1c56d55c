"""transformers' TrainingArguments from keyword arguments, with our defaults and readable errors."""

from __future__ import annotations

import dataclasses
import difflib
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainingArguments

# Where we differ from transformers' defaults. Everything else is theirs.
DEFAULTS: dict[str, Any] = {
    # A small piece set from zero wants more than full fine-tuning's 5e-5. Of the rates in
    # benchmarks/results/quality.json this is the middle one for S2FT and the best for LoRA; models larger than the
    # one measured there, of 135M, want less.
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "logging_steps": 10,
    "report_to": "none",  # no service is contacted unless asked for
}

TRAINING_KEYS = frozenset(field.name for field in dataclasses.fields(TrainingArguments) if field.init)


def training_arguments(known: Iterable[str] = (), **given: Any) -> TrainingArguments:
    """TrainingArguments from `given`; `known` are other names the caller takes, for the did-you-mean."""
    for key in given:
        if key not in TRAINING_KEYS:
            raise TypeError(f"unknown training argument {key!r}{did_you_mean(key, TRAINING_KEYS | set(known))}")
    values = DEFAULTS | given
    if not values.get("output_dir"):
        if values.setdefault("save_strategy", "no") != "no":
            raise ValueError(
                f"save_strategy={values['save_strategy']!r} wants an output_dir, got none; pass output_dir"
            )
        # Trainer creates its folder even if it saves nothing; nobody asked for one in their own.
        values["output_dir"] = tempfile.mkdtemp(prefix="inlay-")
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    return TrainingArguments(**values)


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' or, with nothing close, where the names are listed."""
    close = difflib.get_close_matches(str(key), sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; see transformers.TrainingArguments for the names"
