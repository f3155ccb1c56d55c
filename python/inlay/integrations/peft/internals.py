"""All that inlay uses of PEFT beyond its documented API, in one place, so that a move upstream shows here.

PEFT has no registration for methods from outside: its ``register_peft_method`` wants the name to be in PEFT's own enum.
The tables it fills are plain dicts, looked up by the config's ``peft_type``, and a string is as good a key.
"""

from __future__ import annotations

from typing import Any

WRITTEN_FOR = "0.21"

try:
    import peft
except ImportError as error:
    raise ImportError("inlay.integrations.peft wants the package peft, which is not installed; pip install peft") from (
        error
    )


def moved(what: str) -> str:
    """The message of an error that says which of PEFT's internals is not where it was."""
    return (
        f"inlay.integrations.peft was written for PEFT {WRITTEN_FOR}, got PEFT {peft.__version__}, where {what}; "
        f"install peft=={WRITTEN_FOR}.*, or a newer inlay"
    )


try:
    from peft import LoraConfig, PeftConfig
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.lora.layer import dispatch_default
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
except ImportError as error:
    raise ImportError(moved(str(error))) from error

#: What inlay overrides or calls: if one of these is gone, an override of ours would silently never run.
EXPECTED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (LoraConfig, ("_register_custom_module",)),
    (LoraLinear, ("forward", "update_layer", "get_delta_weight", "merge")),
    (
        BaseTuner,
        (
            "_create_and_replace",
            "_check_target_module_exists",
            "_prepare_adapter_config",
            "_prepare_model",
            "_remap_adapter_state_dict_for_load",
            "_replace_module",
            "_unload_and_optionally_merge",
            "inject_adapter",
            "set_adapter",
            "set_requires_grad",
        ),
    ),
    (
        BaseTunerLayer,
        ("_move_adapter_to_device_of_base_layer", "delete_adapter", "enable_adapters", "get_base_layer", "set_adapter"),
    ),
)


def check_internals(expected: tuple[tuple[Any, tuple[str, ...]], ...] = EXPECTED) -> None:
    """Raise RuntimeError, naming PEFT's version and what is gone, unless all of ``expected`` is there."""
    for owner, names in expected:
        for name in names:
            if not hasattr(owner, name):
                raise RuntimeError(moved(f"{owner.__name__} has no {name}"))


class TypeName(str):
    """A key of PEFT's tables that also answers ``.value``, as members of its enum do."""

    @property
    def value(self) -> str:
        return str(self)


def register(name: TypeName, config: type, tuner: Any) -> None:
    """Enter a method in PEFT's tables; entering it again changes nothing.

    Raises:
        RuntimeError: another package holds the name, or PEFT's internals moved.
    """
    check_internals()
    holder = PEFT_TYPE_TO_CONFIG_MAPPING.get(name, config)
    if holder is not config:
        raise RuntimeError(f"PEFT knows a method {name!r} already, from {holder.__module__}; use that one's config")
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
    PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix


__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "LoraConfig",
    "LoraLinear",
    "PeftConfig",
    "TypeName",
    "check_adapters_to_merge",
    "check_internals",
    "dispatch_default",
    "moved",
    "register",
]
