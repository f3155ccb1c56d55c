"""Whole runs, many widths and evaluations included, take what was estimated; benchmarks/run_memory.py measures it."""

from __future__ import annotations

import json
from pathlib import Path

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "run_memory_cpu.json"


def test_the_documented_runs_are_within_a_tenth():
    ratios = {row["shape"]: row["expected"] / row["measured"] for row in json.loads(RESULT.read_text())["rows"]}
    assert len(ratios) == 5 and all(0.9 <= ratio <= 1.1 for ratio in ratios.values()), ratios
