"""The training API: transformers' Trainer with our data path, optimizer and checks."""

from ..hardware import best_cpu_dtype, best_dtype
from .finetune import FinetuneResult, finetune
from .memory import PeakMemory
from .processes import check_processes_agree
from .trainer import Trainer

__all__ = [
    "FinetuneResult",
    "PeakMemory",
    "Trainer",
    "best_cpu_dtype",
    "best_dtype",
    "check_processes_agree",
    "finetune",
]
