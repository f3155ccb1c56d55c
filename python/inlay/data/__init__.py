"""From records to batches: formats, loss masks, truncation, padding."""

from .collate import Collator
from .dataset import DataReport, TrainingData, prepare
from .formats import Conversation, Example, Plain, load_records, parse_records
from .masking import Encoder, show_mask
from .sampling import LengthGroupedSampler

__all__ = [
    "Collator",
    "Conversation",
    "DataReport",
    "Encoder",
    "Example",
    "LengthGroupedSampler",
    "Plain",
    "TrainingData",
    "load_records",
    "parse_records",
    "prepare",
    "show_mask",
]
