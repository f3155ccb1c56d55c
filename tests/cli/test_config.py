import pytest

import inlay
from inlay.cli.config import build_method, load_config


def write(tmp_path, text):
    path = tmp_path / "cfg.yaml"
    path.write_text(text)
    return path


def test_overrides_replace_and_nest(tmp_path):
    path = write(tmp_path, "model: a\nmethod: {name: S2FT, ratio: 0.03}\nlearning_rate: 1e-3\n")
    config = load_config(path, ["method.ratio=0.5", "max_steps=7", "method.target_modules=[o_proj]", "model=b=c"])
    assert config == {
        "model": "b=c",
        "method": {"name": "S2FT", "ratio": 0.5, "target_modules": ["o_proj"]},
        "learning_rate": 1e-3,  # which YAML 1.1 reads as a string
        "max_steps": 7,
    }


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("modle: a", [], "unknown config key 'modle'; did you mean 'model'"),
        ("model: a", ["learning_rte=1"], "did you mean 'learning_rate'"),
        ("model: a", ["zzz=1"], "unknown config key 'zzz'; known: "),
        ("model: a", ["learning_rate"], "wanted key=value, got 'learning_rate'"),
        ("model: a", ["model.path=b"], "'model' has no keys of its own"),
        ("method: s2ft\nratio: 0.05", [], r"unknown config key 'ratio'; .*inside method: \{name: s2ft, ratio: 0.05\}"),
        ("method: {name: lora, r: 8}\nlora_alpha: 4", [], r"method: \{name: lora, r: 8, lora_alpha: 4\}"),
        ("method: s2ft", ["ratio=0.1"], r"method: \{name: s2ft, ratio: 0.1\}"),
        ("base: int8\nskip_modules: [fc]", [], r"inside base: \{base: int8, skip_modules: \['fc'\]\}"),
        ("method: lora\nratio: 0.05", [], "unknown config key 'ratio'; "),
        ("- a", [], "wanted .* to hold 'key: value' lines, got list"),
        ("a: [", [], "is not YAML"),
    ],
)
def test_bad_configs(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text), overrides)


def test_missing_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="wanted a YAML config"):
        load_config(tmp_path / "no.yaml")


def test_methods_by_name():
    assert build_method("s2ft") == inlay.S2FT()
    assert build_method({"name": "S2FT", "ratio": 0.5, "seed": 3}) == inlay.S2FT(ratio=0.5, seed=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 0.5}, r"wanted method: \{name: S2FT"),
        ({"name": "S2F"}, "unknown method 's2f'; did you mean 's2ft'"),
        ({"name": "S2FT", "ration": 0.5}, "unknown S2FT option 'ration'; did you mean 'ratio'"),
        ({"name": "S2FT", "ratio": 2}, "wanted a fraction in"),
    ],
)
def test_bad_methods(given, message):
    with pytest.raises(ValueError, match=message):
        build_method(given)
