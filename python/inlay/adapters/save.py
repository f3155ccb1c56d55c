"""Save the active adapter of a tuned model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import Method
from ..nn.probe import shallow
from ..nn.whole import owners, unfrozen, whole_tensors
from ..pieces import Piece
from ..schedules import SCHEDULES
from ..sharding import any_sharded, is_sharded, whole, writes_here
from ..state import TuneState, check_in_place, pieces_of, require_state
from ..ties import sharers
from ..version import __version__
from .changed_rows import split_changed
from .files import (
    CARD_NAME,
    CONFIG_NAME,
    DELTAS_ONLY,
    FORMAT_VERSION,
    KEY_PREFIX,
    RESUME_NAME,
    SCHEDULE,
    WEIGHTS_NAME,
    WHOLE,
    base_path_of,
    peft_keys,
    write_files,
)
from .peft_rules import peft_targets


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str | None = None,
    state_dict: dict[str, Tensor] | None = None,
    delta: bool = False,
) -> None:
    """Write one adapter of ``model`` to ``directory``: config, tensors, resume file and card. Never the base.

    Args:
        name: which adapter; the active one if None.
        state_dict: take values from here (a gathered state dict of a sharded model) instead of the model.
        delta: of each tensor trained whole, store the rows alone that differ from the base's, where that is smaller.
            The file then gives the same bits on the very base it was trained on, and an error on any other; there is
            no resume file.

    Raises:
        TypeError: the model is not tuned.
        ValueError: ``name`` is not one adapter; a tensor is empty or not finite; every value is still what tuning
            started from, so that there is nothing to save; or ``delta``, and the method trains no tensor whole or kept
            no original.
    """
    state = require_state(model, "save_pretrained")
    name = name if name is not None else _single_active(state)
    check_in_place(model)
    tensors, resume = collect(model, name, state_dict)
    if not writes_here() and state_dict is None and any_sharded(model):
        return  # this process was needed to gather
    check_worth_saving(model, name, tensors, checkpoint=Path(directory).name.startswith("checkpoint-"))
    method = state.methods[name]
    pieces = pieces_of(model, name)
    said = split_changed(model, name, tensors) if delta else {}
    config = {
        **peft_keys(model),
        **method.peft_fields(pieces),
        "peft_type": method.peft_type,
        "modules_to_save": peft_modules(model, method),
        **(peft_targets(model, pieces) | tied_option(model, name) if method.peft_type == "LORA" else {}),
        "inlay": {
            "base": None if state.base is None else state.base.to_dict(),
            "base_sample": state.base_sample,
            "fingerprint": state.fingerprint,
            **({"delta": said} if said else {}),
            "format": FORMAT_VERSION if said else WHOLE if len(resume) > deltas_in(resume) else DELTAS_ONLY,
            "modules": sorted(pieces),
            "options": method.stored_options(),
            **({"tied": tied} if (tied := sharers(model, pieces)) else {}),
            "unfrozen": sorted(unfrozen(model)),
            "version": __version__,
            "vocabulary": vocabulary_of(model),
            "whole": sorted(whole_tensors(model, name)),
        },
    }
    card = _card(model, state, name)
    files = {WEIGHTS_NAME: tensors, RESUME_NAME: resume, CONFIG_NAME: config, CARD_NAME: card}
    if delta:
        del files[RESUME_NAME]
    write_files(Path(directory), files)
    if delta:
        (Path(directory) / RESUME_NAME).unlink(missing_ok=True)  # of an earlier save, with other values


def collect(
    model: nn.Module, name: str, state_dict: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter's tensors by adapter-file key, and by state-dict key; gathered where they are sharded."""
    tensors, resume = {}, {}
    for path, piece in pieces_of(model, name).items():
        for key, attribute in piece.stored.items():
            full = f"{path}.deltas.{name}.{attribute}"
            resume[full] = whole((state_dict or {}).get(full, getattr(piece, attribute).detach()))
            tensors[f"{KEY_PREFIX}{path}.{key}"] = piece.to_file(key, resume[full])
    for key, value in in_file(model, name, state_dict).items():
        tensors[f"{KEY_PREFIX}{key}"] = resume[key] = value
    for key, value in schedule_tensors(model, name).items():
        tensors[f"{KEY_PREFIX}{SCHEDULE}.{key}"] = resume[f"{SCHEDULES}.{name}.{key}"] = value
    return tensors, resume


def schedule_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The state of adapter ``name``'s schedule; empty where it has none."""
    held: Any = model._modules.get(SCHEDULES)
    return {} if held is None or name not in held else dict(held[name].state_dict())


def in_file(model: nn.Module, name: str, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What adapter ``name`` trains whole and what the user unfroze, by state-dict key; tied tensors apart."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in (whole_tensors(model, name) | unfrozen(model)).items():
        value = whole((state_dict or {}).get(key, tensor)).detach()
        found[key] = value.clone() if id(tensor) in seen else value  # safetensors takes no shared memory
        seen.add(id(tensor))
    return found


def tied_option(model: nn.Module, name: str) -> dict[str, bool]:
    """PEFT's ``ensure_weight_tying``, where two modules hold a tensor trained whole, or the weight of a piece."""
    if sharers(model, pieces_of(model, name)):
        return {"ensure_weight_tying": True}
    holders = Counter(id(held) for _, _, _, held in owners(model) if name in held.copies)
    return {"ensure_weight_tying": True} if any(count > 1 for count in holders.values()) else {}


def deltas_in(resume: Mapping[str, Tensor]) -> int:
    """How many of the tensors, by state-dict key, belong to deltas."""
    return sum(".deltas." in key for key in resume)


def peft_modules(model: nn.Module, method: Method) -> list[str] | None:
    """``modules_to_save`` as PEFT takes it: modules, not single tensors."""
    modules = dict(model.named_modules())
    return [name for name in method.modules_to_save or () if name in modules] or None


def vocabulary_of(model: Any) -> int | None:
    """How many tokens the input embeddings of ``model`` have; None where it has none."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):  # no text model, or no transformers model
        return None


def check_worth_saving(model: nn.Module, name: str, tensors: dict[str, Tensor], checkpoint: bool = False) -> None:
    """Refuse to write an adapter that is empty, broken, or that changes nothing.

    A ``checkpoint`` that changes nothing only warns: under warm-up the first step's learning rate is 0.
    """
    for key, tensor in tensors.items():
        if tensor.numel() == 0:
            raise ValueError(
                f"{key} is empty: the tensor was sharded away or freed; gather the state dict before saving"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{key} holds NaN or infinity: training diverged; lower the learning rate or resume earlier"
            )
    pieces = {path: _holding(piece, path, tensors) for path, piece in pieces_of(model, name).items()}
    still = [path for path, piece in pieces.items() if not piece.changes_anything()]
    if len(still) == len(pieces) and not checkpoint and not (whole_changed(model, name) or unfrozen(model)):
        raise ValueError(f"adapter {name!r} changes nothing: all its values are untrained; train before saving")
    if still:
        warnings.warn(f"adapter {name!r} changes nothing at {len(still)} modules, first {still[0]}", stacklevel=3)


def whole_changed(model: nn.Module, name: str) -> bool:
    """Whether a tensor that adapter ``name`` trains whole differs from the base's; a sharded one is taken to."""
    copies = whole_tensors(model, name)
    return any(
        held.overwritten == name
        or is_sharded(value)
        or not torch.equal(value.detach().to(held.original.dtype), held.original.detach())
        for key, _, _, held in owners(model)
        if (value := copies.get(key)) is not None
    )


def _holding(delta: Piece, path: str, tensors: dict[str, Tensor]) -> Piece:
    """A piece with the values that are to be saved, which may have been gathered."""
    held = shallow(delta, {}, {})
    for key, attribute in delta.stored.items():
        value = tensors.get(f"{KEY_PREFIX}{path}.{key}")
        if value is None:  # exported under other names
            return delta
        kind = "_buffers" if attribute in delta._buffers else "_parameters"
        held.__dict__[kind] = {**held.__dict__[kind], attribute: delta.from_file(key, value)}
    return held


def _single_active(state: TuneState) -> str:
    if len(state.active) != 1:
        raise ValueError(
            f"wanted one active adapter to save, got {list(state.active)}; pass name=... or set_adapter one"
        )
    return state.active[0]


def _card(model: nn.Module, state: TuneState, name: str) -> str:
    method = state.methods[name]
    base = base_path_of(model) or "unknown"
    options = "\n".join(f"- `{key}`: `{value}`" for key, value in method.to_dict().items())
    return (
        f"---\nlibrary_name: inlay\nbase_model: {base}\n---\n\n# {method.peft_type} adapter\n\n"
        f"Trained with inlay {__version__} on `{base}`.\n\n{options}\n\n"
        "```python\nimport inlay\n\nmodel = inlay.load(base_model, path_to_this_directory)\n```\n"
    )
