"""Print the census: one row for each architecture, then what could not be built, and a count."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from .families import FUSED, examine
from .tiny import model_types


def main(names: list[str]) -> int:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    skipped, faulty, count = {}, 0, 0
    print(f"| architecture | class | S²FT's default targets | linears | {' | '.join(FUSED)} | |")
    print("|---|---|---|---|---|---|---|---|")
    for model_type in names or model_types():
        try:
            found = examine(model_type)
        except Exception as error:
            skipped[model_type] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            continue
        count, faulty = count + 1, faulty + bool(found.faults)
        fused = " | ".join(str(found.fused.get(kind, 0)) for kind in FUSED)
        note = "; ".join(found.faults) or (
            f"not tuned: {', '.join(sorted({n.rpartition('.')[2] for n in found.excluded}))}" if found.excluded else ""
        )
        print(
            f"| {model_type} | {found.model_class} | {found.targets} | {found.linears} | {fused} | {note} |", flush=True
        )
    print(f"\n{count} architectures, {faulty} with faults; transformers {transformers.__version__}.")
    print(f"{len(skipped)} others have no tiny model of their own:")
    for model_type, reason in skipped.items():
        print(f"- {model_type}: {reason}")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
