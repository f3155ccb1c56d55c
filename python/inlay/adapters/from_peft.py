"""Adapters that PEFT saved, read as the methods of the same ``peft_type``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..methods import Method
from ..methods.ia3 import IA3
from ..methods.lora import LoRA

#: Options of PEFT's config that say the same here, and those that say nothing about what is computed.
_NAMES = ("target_modules", "exclude_modules", "modules_to_save")
_SAME = ("r", "lora_alpha", "lora_dropout", "use_rslora", *_NAMES)
_IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out", "inference_mode", "inlay"),
    *("layers_pattern", "layers_to_transform", "megatron_config", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "revision", "task_type", "eva_config", "runtime_config"),
)
#: Initializations that leave the base as it is.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def lora_of_peft(config: Mapping[str, Any], where: Path) -> LoRA:
    """The method of a config that PEFT wrote.

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
    return _made(LoRA, config, _SAME, where)


def ia3_of_peft(config: Mapping[str, Any], where: Path) -> IA3:
    """The method of a config that PEFT wrote.

    Raises:
        ValueError: it uses an option that :class:`inlay.IA3` does not have.
    """
    same = ("feedforward_modules", *_NAMES)
    for option, value in config.items():
        if option not in (*same, *_IGNORED, "init_ia3_weights") and value:
            raise ValueError(
                f"{where}: this adapter with peft_type='IA3' uses {option}={value!r}, which inlay's IA3 has not; merge "
                "it with PEFT and load the merged model"
            )
    return _made(IA3, config, same, where)


#: What reads the configs that PEFT itself wrote, by ``peft_type``.
READERS: dict[str, Callable[[Mapping[str, Any], Path], Method]] = {
    LoRA.peft_type: lora_of_peft,
    IA3.peft_type: ia3_of_peft,
}


def _made(method: Any, config: Mapping[str, Any], same: Sequence[str], where: Path) -> Any:
    given = {name: config[name] for name in same if config.get(name) is not None}
    given = {name: sorted(value) if isinstance(value, list | set | tuple) else value for name, value in given.items()}
    try:
        return method(**given)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None
