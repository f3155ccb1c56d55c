"""A data set ready for training: encoded, truncated, counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .formats import Example, RecordSource, load_records, parse_records
from .masking import IGNORED, Encoder, Sample


@dataclass
class DataReport:
    """What happened to the records on their way to samples."""

    format: str
    records: int
    samples: int = 0
    truncated: int = 0  # samples cut at max_length
    dropped: int = 0  # samples left without a supervised token
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0

    def __str__(self) -> str:
        share = 100 * self.supervised_tokens / max(self.tokens, 1)
        notes = [f"{self.truncated} truncated"] * bool(self.truncated) + [f"{self.dropped} dropped"] * bool(
            self.dropped
        )
        return (
            f"{self.samples:,} samples from {self.records:,} records ({self.format}), {self.tokens:,} tokens, "
            f"{share:.1f}% supervised, longest {self.longest}" + "".join(f", {note}" for note in notes)
        )


@dataclass
class TrainingData:
    """A map-style data set of {input_ids, labels}."""

    samples: list[Sample]
    report: DataReport

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def prepare(
    source: RecordSource,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    train_on_inputs: bool = False,
    chat_template: bool | None = None,
) -> TrainingData:
    """Load, encode and truncate records; drop and count samples that would train on nothing."""
    if max_length < 2:
        raise ValueError(f"wanted max_length of at least 2, got {max_length}")
    encoder = Encoder(tokenizer, train_on_inputs=train_on_inputs, chat_template=chat_template)
    records = load_records(source)
    format_name, examples = parse_records(records, chat=encoder.chat)
    report = DataReport(format=format_name, records=len(records))
    samples = []
    for index, example in enumerate(examples):
        for sample in _encode(encoder, example, index):
            sample = _truncate(sample, max_length, report)
            if supervised_count(sample["labels"]):
                samples.append(sample)
                _count(sample, report)
            else:
                report.dropped += 1
    if not samples:
        raise ValueError(_nothing_left(report, max_length))
    return TrainingData(samples, report)


def _encode(encoder: Encoder, example: Example, index: int) -> list[Sample]:
    try:
        return encoder.encode(example)
    except Exception as error:  # chat templates raise jinja's errors, and name no record
        raise ValueError(f"record {index}: {error}") from error


def supervised_count(labels: list[int]) -> int:
    """Positions that contribute to the loss. The label at position 0 has nothing to predict it."""
    return sum(label != IGNORED for label in labels[1:])


def _truncate(sample: Sample, max_length: int, report: DataReport) -> Sample:
    if len(sample["input_ids"]) <= max_length:
        return sample
    report.truncated += 1
    return {key: values[:max_length] for key, values in sample.items()}


def _count(sample: Sample, report: DataReport) -> None:
    report.samples += 1
    report.tokens += len(sample["input_ids"])
    report.supervised_tokens += supervised_count(sample["labels"])
    report.longest = max(report.longest, len(sample["input_ids"]))


def _nothing_left(report: DataReport, max_length: int) -> str:
    if report.truncated:
        advice = f"raise max_length (now {max_length}), which cut {report.truncated} samples before their completion"
    else:
        advice = "check that the records have a completion (messages: at least one turn with role 'assistant')"
    return (
        f"wanted at least one supervised token, got none in all {report.records} records "
        f"({report.format} format); {advice}"
    )
