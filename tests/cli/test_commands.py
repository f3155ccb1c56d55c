"""The commands on a toy model: train, then everything that can be done with the adapter."""

import json

import pytest
import torch
import yaml
from toys import build_model, build_tokenizer

from inlay.cli import main


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A model on disk, data, a config, and the adapter that `inlay train` made of them."""
    folder = tmp_path_factory.mktemp("cli")
    build_model().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    records = [{"prompt": f"{word}:", "completion": f" {word[::-1]}"} for word in ("cat", "mat", "sat", "hello")]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "model": str(folder / "model"),
        "method": {"name": "S2FT", "ratio": 0.25},
        "data": str(folder / "data.jsonl"),
        "output_dir": str(folder / "adapter"),
        "max_steps": 2,
        "learning_rate": 0.05,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    (folder / "cfg.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(folder / "cfg.yaml"), "max_steps=3"]) == 0
    return folder


def test_train_writes_an_adapter_and_obeys_overrides(workplace):
    record = json.loads((workplace / "adapter" / "inlay_run.json").read_text())
    assert record["result"]["steps"] == 3
    assert (workplace / "adapter" / "adapter_model.safetensors").is_file()


def test_generate_with_and_without_the_adapter(workplace, capsys):
    common = [str(workplace / "cfg.yaml"), "--max-new-tokens", "4"]
    assert main(["generate", *common, "--prompt", "cat:", "--prompt", "mat:"]) == 0
    assert main(["generate", *common, "--base", "--prompt", "cat:"]) == 0
    assert main(["generate", "--model", str(workplace / "model"), "--temperature", "1", "--prompt", "cat:"]) == 0
    assert "error" not in capsys.readouterr().err


def test_merge_verify_export(workplace, capsys):
    config = str(workplace / "cfg.yaml")
    merged, lora = str(workplace / "merged"), str(workplace / "lora")
    assert main(["merge", config, "--output", merged]) == 0
    assert main(["verify", config, "--merged", merged]) == 0
    assert "greedy tokens equal" in capsys.readouterr().out
    assert main(["export", config, "--output", lora]) == 0
    assert json.loads((workplace / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    # The base model is not the merged one, and verify says so.
    assert main(["verify", config, "--merged", str(workplace / "model"), "--tolerance", "1e-6"]) == 1
    # Nothing is written over.
    assert main(["merge", config, "--output", merged]) == 2
    assert "wanted a new or empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "{dir}/no.yaml"], "wanted a YAML config, got"),
        (["train", "{dir}/cfg.yaml", "max_step=3"], "unknown config key 'max_step'; did you mean 'max_steps'"),
        (["train", "{dir}/cfg.yaml", "method.ratio=7"], "wanted a fraction in (0, 1]"),
        (["train", "{dir}/cfg.yaml", "method.target_modules=[nope]"], "nope"),
        (["train", "{dir}/cfg.yaml", "data=null"], "wanted the key 'data'"),
        (["train", "{dir}/cfg.yaml", "data={dir}/no.jsonl"], "does not exist"),
        (["train", "{dir}/cfg.yaml", "gguf_file=no.gguf"], "wanted the GGUF file no.gguf"),
        (["train", "{dir}/cfg.yaml", "dtype=int8"], "wanted a dtype"),
        (["generate", "--prompt", "x"], "wanted a model, got none"),
        (["merge", "--model", "{dir}/model", "--output", "{dir}/m"], "wanted an adapter, got none"),
        (["export", "{dir}/cfg.yaml", "--output", "{dir}/x", "--format", "gguf"], "gguf"),
    ],
)
def test_errors_are_one_line_and_status_2(workplace, capsys, argv, message):
    assert main([part.format(dir=workplace) for part in argv]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("inlay: error: ")]
    assert len(err) == 1 and message in err[0]


def test_a_typo_costs_no_loading_of_the_model(workplace, monkeypatch):
    from inlay.cli import train

    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert main(["train", str(workplace / "cfg.yaml"), "learning_rat=1"]) == 2
    assert main(["train", str(workplace / "cfg.yaml"), "method.ratoi=1"]) == 2


def test_debug_shows_the_traceback(workplace, monkeypatch):
    monkeypatch.setenv("INLAY_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["train", str(workplace / "no.yaml")])


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("train", "generate", "merge", "export", "verify", "doctor"))


def test_init_writes_a_config_that_trains(workplace, tmp_path, capsys):
    path = str(tmp_path / "new.yaml")
    data = str(workplace / "data.jsonl")
    given = ["--model", str(workplace / "model"), "--data", data, "--output-dir", str(tmp_path / "out: put")]
    assert main(["init", path, *given]) == 0
    assert "prompt/completion records" in (tmp_path / "new.yaml").read_text()
    assert main(["estimate", path]) == 0
    assert main(["train", path, "max_steps=1", "method.ratio=0.25"]) == 0
    assert (tmp_path / "out: put" / "adapter_model.safetensors").is_file()
    assert main(["init", path, *given]) == 2  # nothing is written over
    assert "which exists" in capsys.readouterr().err


def test_init_looks_at_the_model_and_the_data(workplace, tmp_path, capsys):
    model, data, new = str(workplace / "model"), str(workplace / "data.jsonl"), str(tmp_path / "new.yaml")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for given, wanted in (
        (["--model", str(tmp_path), "--data", data], "wanted a model folder"),
        (["--model", model, "--data", str(tmp_path / "no.jsonl")], "does not exist"),
        (["--model", model, "--data", str(empty)], "holds none"),
    ):
        assert main(["init", new, *given]) == 2
        assert wanted in capsys.readouterr().err
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
        code = main(["init", new, "--model", str(tmp_path), "--data", data])
        assert code == (0 if name == "a.gguf" else 2)
        if code == 0:
            assert yaml.safe_load((tmp_path / "new.yaml").read_text())["gguf_file"] == "a.gguf"
            (tmp_path / "new.yaml").unlink()


def test_help_of_train_shows_a_config(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    example = "\n".join(line[2:] for line in shown[shown.index("  model:") :].splitlines())
    assert set(yaml.safe_load(example)) >= {"model", "method", "data", "output_dir"}


@pytest.mark.parametrize("fast", ["bfloat16", "float32"])
def test_auto_trains_in_the_fast_dtype_and_merges_as_stored(workplace, tmp_path, capsys, monkeypatch, fast):
    """The checkpoint is float32; so is what is merged into it."""
    from safetensors import safe_open

    monkeypatch.setattr("inlay.train.best_dtype", lambda: getattr(torch, fast))
    monkeypatch.setattr("inlay.hardware.best_dtype", lambda device: getattr(torch, fast))
    config, output = str(workplace / "cfg.yaml"), f"output_dir={tmp_path / 'adapter'}"
    assert main(["train", config, output]) == 0
    assert f"inlay: dtype: {fast}" in capsys.readouterr().out
    assert main(["train", config, output, "dtype=float32"]) == 0
    assert "inlay: dtype: float32" in capsys.readouterr().out
    assert main(["train", config, output, "dtype=checkpoint"]) == 0
    assert "inlay: dtype: float32" in capsys.readouterr().out
    arguments = [config, "--adapter", str(tmp_path / "adapter")]
    for name, extra in (("stored", []), ("auto", ["--dtype", "auto"])):
        assert main(["merge", *arguments, "--output", str(tmp_path / name), *extra]) == 0
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118
