import sys
from pathlib import Path

# The toy model and tokenizer live with the data tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
