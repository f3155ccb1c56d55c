"""Adapters of every released format: they load, and answer as they did when they were made."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from comparing import assert_close
from safetensors.torch import load_file

import inlay
from inlay.adapters.files import FORMAT_VERSION

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(path.parent for path in (GOLDEN / "adapters").glob("v*/*/adapter_config.json"))

_spec = importlib.util.spec_from_file_location("make_adapters", GOLDEN / "make_adapters.py")
assert _spec is not None and _spec.loader is not None
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)


def setting(folder: Path):
    method, base, labels = made.KINDS[folder.parent.name][folder.name]
    return (method() if callable(method) else method), base, labels


def test_every_format_has_its_adapters():
    versions = {folder.parent.name for folder in FOLDERS}
    assert versions == {f"v{version}" for version in range(1, FORMAT_VERSION + 1)}
    assert {v: len([f for f in FOLDERS if f.parent.name == v]) for v in versions} == {
        version: len(kinds) for version, kinds in made.KINDS.items()
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_it_answers_as_it_did(folder):
    _, base, labels = setting(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["inlay"]["format"] == int(folder.parent.name[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = inlay.load(made.base_model(labels), folder, base=base)
    wanted = load_file(folder / "logits.safetensors")
    assert torch.equal(wanted["ids"], made.IDS)
    with inlay.disabled(model):
        assert float((made.answer(model) - wanted["logits"]).abs().max()) > 0.05
    assert_close(made.answer(model), wanted["logits"], atol=5e-5, what=folder.name)


# LoftQ chose the base together with the adapter, and loading makes it again: nothing else can take its file.
# Of rows alone there is no resume file.
TUNABLE = [f for f in FOLDERS if not setting(f)[0].needs_base and (f / "model.safetensors").exists()]


@pytest.mark.parametrize("folder", TUNABLE, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_its_resume_file_goes_into_a_tuned_model(folder):
    method, base, labels = setting(folder)
    model = inlay.tune(made.base_model(labels), method, base=base)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if hasattr(model, "set_adapter"):
        model.set_adapter("default")
    assert_close(made.answer(model), load_file(folder / "logits.safetensors")["logits"], atol=5e-5, what=folder.name)


def test_a_format_of_the_future_is_refused(tmp_path):
    config = json.loads((FOLDERS[0] / "adapter_config.json").read_text())
    config["inlay"]["format"] = FORMAT_VERSION + 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"format {FORMAT_VERSION + 1} is newer than this inlay reads"):
        inlay.load(made.base_model(), tmp_path)
