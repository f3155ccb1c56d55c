"""What PEFT does to an adapter when it loads one: names it takes for others, modules it refuses.

With transformers 5 the experts of many mixtures became one tensor, and PEFT rewrites the targets of adapters for them
by the last part of the name: shared experts and dense layers that are called the same are lost, with a warning. Named
as parameters (``target_parameters``) they are left alone.

Source: peft/utils/transformers_weight_conversion.py and peft/tuners/tuners_utils.py of PEFT 0.21.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.quantized import QuantizedWeight, dense_linear
from ..nn.tuned_linear import TunedLinear
from ..nn.whole import settle_whole
from ..state import make_plain

#: Last parts of names that PEFT takes for fused experts, by the pattern that transformers converts a model by.
_TAKEN = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
_MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_REFUSED_IN_MAMBAS = ("out_proj", "conv1d")


def peft_targets(model: Any, pieces: Mapping[str, Any]) -> dict[str, list[str]]:
    """``target_modules`` and, if some need it, ``target_parameters`` of a LoRA config that PEFT takes as they are.

    ``pieces``: by module; those on experts say which stacks they are on.
    """
    taken = _TAKEN.get(_pattern(model), ())
    stacks = [f"{path}.{name}" for path, piece in pieces.items() for name in getattr(piece, "names", ())]
    targets = [path for path, piece in pieces.items() if not hasattr(piece, "names")]
    loose = [name for name in targets if name.rpartition(".")[2] in taken]
    kept = {"target_modules": sorted(set(targets) - set(loose))}
    parameters = [*(f"{name}.weight" for name in sorted(loose)), *stacks]
    return kept | ({"target_parameters": parameters} if parameters else {})


def _pattern(model: Any) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as patterns
    except ImportError:
        return ""
    return "mixtral" if kind == "mixtral" else str(patterns.get(kind, ""))


def check_accepted(model: Any, targets: Sequence[str]) -> None:
    """ValueError if PEFT refuses LoRA on one of the modules ``targets`` in this model."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    refused = [name for name in targets if name.rpartition(".")[2] in _REFUSED_IN_MAMBAS]
    if kind in _MAMBAS and refused:
        raise ValueError(
            f"peft-lora: PEFT refuses LoRA on {refused[0]} and {len(refused) - 1} more, since fused kernels of Mamba "
            f"models ({kind}) may read its weight without calling it; use inlay.merge, or tune other target_modules"
        )


def check_in_peft(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Load what is to be written with PEFT itself, where it is installed, on a model without weights.

    Raises:
        ValueError: PEFT refuses it, or drops or changes a tensor.
    """
    if importlib.util.find_spec("peft") is None:
        return
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    empty = {key: tensor.to("meta") for key, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = get_peft_model(_skeleton(model), LoraConfig(**config), low_cpu_mem_usage=True)
            found = set_peft_model_state_dict(theirs, empty, low_cpu_mem_usage=True)
            held = get_peft_model_state_dict(theirs, save_embedding_layers=False)
        except Exception as error:  # whatever it is, the user would get it at loading
            raise ValueError(f"peft-lora: PEFT cannot load this adapter ({error}); use inlay.merge") from error
    lost = [key for key in found.missing_keys if ".lora_" in key or ".modules_to_save." in key]
    lost += [*found.unexpected_keys, *(key for key in tensors if ".lora_" in key and key not in held)]
    if lost:
        raise ValueError(
            f"peft-lora: PEFT would load this adapter without {len(lost)} of its tensors, first {sorted(lost)[0]}; "
            "use inlay.merge, or tune other target_modules"
        )


def _skeleton(model: nn.Module) -> nn.Module:
    """The plain base model on the meta device."""
    from ..estimate.shapes import meta_model

    made = meta_model(model, None)
    settle_whole(made)
    for name, module in list(made.named_modules()):
        if isinstance(module, TunedLinear | QuantizedWeight):
            conv1d = hasattr(module, "nf") or getattr(module, "conv1d", False)
            weight = torch.empty(module.out_features, module.in_features, device="meta")
            made.set_submodule(name, dense_linear(weight, module.bias, bool(conv1d)))
    return make_plain(made)
