"""The golden files' reader lives with the bases' tests, the toy model and tokenizer with the data tests."""

import sys
from pathlib import Path

for folder in ("bases", "data"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
