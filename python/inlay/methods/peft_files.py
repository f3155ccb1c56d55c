"""Options of a method in an ``adapter_config.json`` that PEFT wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: What names modules, in every config.
_NAMES = ("target_modules", "exclude_modules", "modules_to_save")
#: What says nothing about what is computed.
_IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "inlay", "layers_pattern"),
    *("layers_to_transform", "peft_type", "peft_version", "revision", "runtime_config", "task_type"),
)


def options_in(
    config: Mapping[str, Any],
    same: Sequence[str],
    where: Path,
    ignored: Callable[[str, Any], bool] = lambda option, value: False,
) -> dict[str, Any]:
    """The options ``same``, which mean the same here, and those that name modules.

    Args:
        ignored: whether another option, of this value, changes nothing of what is computed.

    Raises:
        ValueError: the config uses an option that is none of these.
    """
    same = (*same, *_NAMES)
    for option, value in config.items():
        if value and option not in (*same, *_IGNORED) and not ignored(option, value):
            kind = config.get("peft_type")
            raise ValueError(
                f"{where}: this adapter with peft_type={kind!r} uses {option}={value!r}, which inlay's {kind} has not; "
                "merge it with PEFT and load the merged model"
            )
    given = {name: config[name] for name in same if config.get(name) is not None}
    return {name: sorted(value) if isinstance(value, list | set | tuple) else value for name, value in given.items()}
