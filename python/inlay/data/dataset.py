"""A data set ready for training: encoded, truncated, counted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..version import __version__ as version
from .formats import Example, RecordSource, iter_examples, iter_records
from .masking import ENCODING, IGNORED, Encoder, Sample
from .packing import PackedSamples
from .storage import DiskSamples, SampleWriter, read_made_from, write_made_from


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
    rows: int = 0  # rows the samples were packed into; 0: not packed
    highest_token: int = -1  # of all ids and labels; -1: not counted
    notes: list[str] = field(default_factory=list)  # what the chat template cannot teach

    def __str__(self) -> str:
        share = 100 * self.supervised_tokens / max(self.tokens, 1)
        counts = {"truncated": self.truncated, "dropped": self.dropped, "packed rows": self.rows}
        notes = [f"{count:,} {what}" for what, count in counts.items() if count]
        return (
            f"{self.samples:,} samples from {self.records:,} records ({self.format}), {self.tokens:,} tokens, "
            f"{share:.1f}% supervised, longest {self.longest}"
            + "".join(f", {note}" for note in notes)
            + "".join(f"\ninlay: data: note: {note}" for note in self.notes)
        )


@dataclass
class TrainingData:
    """A map-style data set of {input_ids, labels}; packed rows also have position_ids, numbered samples a number."""

    samples: Sequence[Sample]
    report: DataReport
    numbered: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return {**self.samples[index], "number": [index]} if self.numbered else self.samples[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample."""
        held = getattr(self.samples, "lengths", None)
        return held if held is not None else [len(sample["input_ids"]) for sample in self.samples]

    @property
    def packed(self) -> bool:
        return isinstance(self.samples, PackedSamples)

    def pack(self, max_length: int) -> TrainingData:
        """The same samples in rows of at most ``max_length`` tokens; see :mod:`inlay.data.packing`."""
        rows = PackedSamples(self.samples, self.lengths, max_length)
        return TrainingData(rows, dataclasses.replace(self.report, rows=len(rows)))

    def sha256(self) -> str:
        """A fingerprint of all samples, in order."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(json.dumps(self.samples[index]).encode())
        return digest.hexdigest()


def prepare(
    source: RecordSource,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    train_on_inputs: bool = False,
    chat_template: bool | None = None,
    folder: str | Path | None = None,
) -> TrainingData:
    """Load, encode and truncate records; drop and count samples that would train on nothing.

    Args:
        source: a .jsonl, .json or .parquet path, or an iterable of records (a list, a ``datasets.Dataset``).
        max_length: longer samples are cut, and counted.
        train_on_inputs: put loss on prompts too. chat_template: see :class:`inlay.data.Encoder`.
        folder: write the encoded samples there and map them, instead of holding them in memory; with a .jsonl or
            .parquet source, neither the records nor the samples need to fit. A folder that holds this very source,
            encoded in this very way, is taken as it is.

    Raises:
        ValueError: a record of no or another format; not one supervised token in all records.
        FileExistsError: ``folder`` holds other samples.
    """
    if max_length < 2:
        raise ValueError(f"wanted max_length of at least 2, got {max_length}")
    encoder = Encoder(tokenizer, train_on_inputs=train_on_inputs, chat_template=chat_template)
    key = None if folder is None else _key(source, tokenizer, max_length, train_on_inputs, encoder.chat)
    made = None if folder is None else read_made_from(folder)
    if folder is not None and made is not None and key is not None and made["key"] == key:
        return TrainingData(DiskSamples(folder), DataReport(**made["report"]))
    report = DataReport(format="", records=0)
    encoded = _encode_all(iter_examples(iter_records(source), chat=encoder.chat), encoder, max_length, report)
    samples: Sequence[Sample]
    if folder is None:
        samples = list(encoded)
    else:
        with SampleWriter(folder) as writer:
            for sample in encoded:
                writer.append(sample)
        samples = DiskSamples(folder)
        write_made_from(folder, {"key": key, "report": dataclasses.asdict(report)})
    if not len(samples):
        raise ValueError(_nothing_left(report, max_length))
    return TrainingData(samples, report)


def _key(source: RecordSource, tokenizer: Any, *options: Any) -> list[Any] | None:
    """What the encoded samples of a file depend on; None for records in memory, which leave no trace to know again."""
    if not isinstance(source, str | Path) or not Path(source).is_file():
        return None
    found = Path(source).stat()
    backend = getattr(tokenizer, "backend_tokenizer", None)  # holds normalizers and what is added to every text
    words = json.dumps(
        [
            sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
            {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
            getattr(tokenizer, "chat_template", None),
            [ENCODING, version],
        ]
    )
    file = [str(Path(source).resolve()), found.st_size, found.st_mtime_ns]
    return [file, hashlib.sha256(words.encode()).hexdigest(), *options]


def _encode_all(
    examples: Iterator[tuple[str, Example]], encoder: Encoder, max_length: int, report: DataReport
) -> Iterator[Sample]:
    for index, (report.format, example) in enumerate(examples):
        report.records += 1
        for sample in _encode(encoder, example, index):
            sample = _truncate(sample, max_length, report)
            if supervised_count(sample["labels"]):
                _count(sample, report)
                yield sample
            else:
                report.dropped += 1
        report.notes = list(encoder.notes)


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
    report.highest_token = max(report.highest_token, *sample["input_ids"], *sample["labels"])


def _nothing_left(report: DataReport, max_length: int) -> str:
    if report.truncated:
        advice = f"raise max_length (now {max_length}), which cut {report.truncated} samples before their completion"
    else:
        advice = "check that the records have a completion (messages: at least one turn with role 'assistant')"
    return (
        f"wanted at least one supervised token, got none in all {report.records} records "
        f"({report.format} format); {advice}"
    )
