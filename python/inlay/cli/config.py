"""Configs of `inlay train`: a YAML file, `key=value` overrides, and no key that is silently ignored.

model: path/to/model            # a local folder (or a hub name, where there is a network)
gguf_file: model.Q4_1.gguf      # optional: a GGUF file in that folder, dequantized
dtype: auto                     # the default: bfloat16 where this machine multiplies it, else float32; or a torch
                                # dtype, or checkpoint: the one that the weights are stored in
method: {name: S2FT, ratio: 0.03}
base: nf4                       # optional: quantize the model first; or {base: nf4, double_quant: true, ...}
compute: int8                   # optional: frozen products in 8 bits, where the CPU has them
data: train.jsonl               # formats: inlay.data.formats
eval_data: test.jsonl           # optional
max_length: 1024
packing: true                   # optional: several samples in a row of max_length tokens, kept apart
padding_free: false             # optional: keep the padding of batches ("auto" drops it where that is proven)
cache_frozen: true              # optional: run frozen blocks once a sample, for runs of several epochs
data_folder: encoded            # optional: encoded samples on disk instead of in memory
output_dir: out                 # and any other name of transformers.TrainingArguments
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MODEL_KEYS = frozenset({"model", "gguf_file", "dtype"})
DATA_KEYS = frozenset(
    {
        "data",
        "eval_data",
        "max_length",
        "train_on_inputs",
        "chat_template",
        "packing",
        "padding_free",
        "compute",
        "cache_frozen",
        "data_folder",
        "preflight",
        "fresh_optimizer",
    }
)

# YAML 1.1 reads 1e-3 as a string, for want of a dot; nobody who writes it means one.
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The file's keys, with `key=value` and `method.key=value` overrides applied, all checked."""
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"wanted a YAML config, got {path}, which does not exist")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"wanted {path} to hold 'key: value' lines, got {type(config).__name__}")
    for override in overrides:
        _override(config, override)
    config = _numbers(config)
    check_keys(config)
    return config


def check_keys(config: Mapping[str, Any]) -> None:
    """Raise on a key that nothing reads."""
    from ..train.arguments import TRAINING_KEYS

    known = MODEL_KEYS | DATA_KEYS | TRAINING_KEYS | {"method", "base"}
    for key in config:
        if key not in known and (section := _section_of(str(key), config)) is not None:
            raise ValueError(f"unknown config key {key!r}; it belongs inside {section}")
    reject_unknown(config, known, "config key")


def _section_of(key: str, config: Mapping[str, Any]) -> str | None:
    """How to write ``key``, and what stands beside it now, as an option of the method or the base; None if neither has
    it."""
    from ..bases import BaseConfig
    from ..methods import METHODS

    method, base = _inner(config.get("method", "S2FT"), "name"), _inner(config.get("base") or "nf4", "base")
    given = {name.lower(): cls for name, cls in METHODS.items()}.get(str(method.get("name")).lower())
    for section, inner, kinds in (
        ("method", method, [given] if given is not None else [*METHODS.values()]),
        ("base", base, [BaseConfig]),
    ):
        if any(key in {field.name for field in dataclasses.fields(kind) if field.init} for kind in kinds):
            options = ", ".join(f"{name}: {value}" for name, value in {**inner, key: config[key]}.items())
            return f"{section}: {{{options}}}"
    return None


def _inner(given: Any, name: str) -> dict[str, Any]:
    return dict(given) if isinstance(given, Mapping) else {name: given}


def reject_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """ValueError with a did-you-mean for the first of `given` that is not `known`."""
    names = sorted(known)
    for key in given:
        if key in names:
            continue
        close = difflib.get_close_matches(str(key), names, n=1)
        listed = (
            f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names[:20])}" + ", ..." * (len(names) > 20)
        )
        raise ValueError(f"unknown {what} {key!r}; {listed}")


def build_method(given: Any) -> Any:
    """A method config from {name: S2FT, ratio: 0.03, ...}, or from a name alone."""
    from ..methods import METHODS

    options = {"name": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping) or "name" not in options:
        raise ValueError(f"wanted method: {{name: S2FT, ratio: 0.03}}, got method: {given!r}")
    methods = {name.lower(): method for name, method in METHODS.items()}
    reject_unknown([str(options["name"]).lower()], methods, "method")
    method = methods[str(options["name"]).lower()]
    fields = {field.name for field in dataclasses.fields(method) if field.init}
    arguments: dict[str, Any] = {key: value for key, value in options.items() if key != "name"}
    reject_unknown(arguments, fields, f"{options['name']} option")
    return method(**arguments)


def build_base(given: Any) -> Any:
    """A base config from {base: nf4, blocksize: 64, ...}, from a name alone, or None."""
    from ..bases import BaseConfig

    if not isinstance(given, Mapping):
        return given if given is None else BaseConfig.of(str(given))
    reject_unknown(given, {field.name for field in dataclasses.fields(BaseConfig)}, "base option")
    return BaseConfig(**given)


def _override(config: dict[str, Any], override: str) -> None:
    import yaml

    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"wanted key=value, got {override!r}; for a nested key write method.ratio=0.03")
    *parents, leaf = key.split(".")
    section = config
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ValueError(f"{override!r}: {parent!r} has no keys of its own in this config; write {parent}={value}")
    section[leaf] = yaml.safe_load(value)


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value
