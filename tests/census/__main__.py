"""Print the census: one row for each architecture, then what could not be built, and a count.

PYTHONPATH=tests python -m census > docs/families.md
PYTHONPATH=tests python -m census llama falcon
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from .examine import FUSED, Finding, examine
from .tiny import model_types

HEAD = """# Families

What each architecture of the installed transformers gets, tried on a tiny model of random weights: what S²FT tunes by
default, how many linears LoRA tunes, how many blocks are fused. Every row passed: no logit moves at `tune`, in eval and
in training mode; gradients are those of the same model without fused blocks; saved and loaded it is the same. A last
column that is not empty says what is wrong, or which linears cannot be tuned because their parents read the weight
without calling them.

`PYTHONPATH=tests python -m census > docs/families.md` makes this page; `make test` and `make test-slow` assert it.
"""


def row(found: Finding) -> str:
    """One line of the table."""
    left_out = sorted({name.rpartition(".")[2] for name in found.excluded})
    note = "; ".join(found.faults) or (f"not tuned: {', '.join(left_out)}" if left_out else "")
    fused = " | ".join(str(found.fused.get(kind, 0)) for kind in FUSED)
    return f"| {found.model_type} | {found.model_class} | {found.targets} | {found.linears} | {fused} | {note} |"


def main(names: list[str]) -> int:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    skipped, faulty, count = {}, 0, 0
    print(HEAD)
    print(f"| architecture | class | S²FT's default targets | linears | {' | '.join(FUSED)} | |")
    print("|" + "---|" * (5 + len(FUSED)))
    for model_type in names or model_types():
        try:
            found = examine(model_type)
        except Exception as error:
            skipped[model_type] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            continue
        count, faulty = count + 1, faulty + bool(found.faults)
        print(row(found), flush=True)
    print(f"\n{count} architectures, {faulty} with faults; transformers {transformers.__version__}.\n")
    print(f"{len(skipped)} others have no tiny model that runs by itself:\n")
    for model_type, reason in skipped.items():
        print(f"- {model_type}: {reason}")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
