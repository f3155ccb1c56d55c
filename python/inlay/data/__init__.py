"""From records to batches: formats, loss masks, truncation, padding."""

from .collate import Collator
from .dataset import DataReport, TrainingData, prepare
from .formats import Conversation, Example, Plain, Tokenized, iter_records, load_records, parse_records
from .masking import Encoder, show_mask
from .packing import check_samples_stay_apart
from .sampling import LengthGroupedSampler
from .storage import DiskSamples

__all__ = [
    "Collator",
    "Conversation",
    "DataReport",
    "DiskSamples",
    "Encoder",
    "Example",
    "LengthGroupedSampler",
    "Plain",
    "Tokenized",
    "TrainingData",
    "check_samples_stay_apart",
    "iter_records",
    "load_records",
    "parse_records",
    "prepare",
    "show_mask",
]
