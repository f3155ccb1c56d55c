"""LoRA adapters that PEFT saved, read as :class:`inlay.LoRA`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Options of PEFT's config that say the same here, and those that say nothing about what is computed.
_SAME = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "modules_to_save")
_IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out", "inference_mode", "inlay"),
    *("layers_pattern", "layers_to_transform", "megatron_config", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "revision", "task_type", "eva_config", "runtime_config"),
)
#: Initializations that leave the base as it is.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def options_of_peft(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The options of :class:`inlay.LoRA` in a config that PEFT wrote.

    Raises:
        ValueError: it uses an option that :class:`inlay.LoRA` does not have.
    """
    for option, value in config.items():
        if option in (*_SAME, *_IGNORED) or not value or (option == "bias" and value == "none"):
            continue
        if option == "init_lora_weights" and (value in _PLAIN_INITS):
            continue
        raise ValueError(
            f"{where}: this adapter with peft_type='LORA' uses {option}={value!r}, which inlay's LoRA has not; merge "
            "it with PEFT and load the merged model"
        )
    given = {name: config[name] for name in _SAME if config.get(name) is not None}
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(given.get(name), list | set | tuple):
            given[name] = sorted(given[name])
    return given
