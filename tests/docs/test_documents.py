"""What documents name must exist, and what tables say must be what was measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from inlay.methods import BY_CLASS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_PATH = re.compile(r"`((?:csrc|cuda|python|tests|benchmarks|examples|docs|\.ci)/[\w./*<>-]*|[\w-]+\.(?:md|txt|toml))`")
#: Files that a run writes, or that a reader is invited to write.
WRITTEN = {"adapter_config.json", "cuda/<op>.cu"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_a_document_names_exists(document: Path) -> None:
    named = {match for match in _PATH.findall(document.read_text()) if match not in WRITTEN}
    missing = [name for name in named if not list(ROOT.glob(name.rstrip("/")))]
    assert not missing, f"{document.name} names {missing}, which this repository does not have"


def test_contributing_names_the_files_of_the_recipe() -> None:
    named = set(_PATH.findall((ROOT / "CONTRIBUTING.md").read_text()))
    recipe = {"csrc/ops.h", "csrc/cpu/rms_norm.cpp", "python/inlay/ops/rms_norm.py", "python/inlay/methods/lora.py"}
    assert recipe <= named, f"CONTRIBUTING.md no longer walks through {sorted(recipe - named)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing, f"{document.name} links to {missing}"


def test_every_method_has_its_row_and_its_advice() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `inlay\.(\w+)`.*$", text, re.MULTILINE)}
    assert set(rows) == set(BY_CLASS)
    assert all(row.count("|") in (6, 7) and "|  |  |" not in row for row in rows.values())


def test_tables_are_what_was_measured() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + "\nrun `python benchmarks/tables.py`"
