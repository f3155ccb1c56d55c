"""What each architecture gets: default targets of S²FT, fused blocks, and whether tuning keeps what the model computes.

PYTHONPATH=tests python -m census                  # all of them, as the table of docs/families.md
PYTHONPATH=tests python -m census llama falcon     # some
"""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import inlay
from inlay.nn.attention import FusedAttention
from inlay.nn.blocks import FusedGatedMLP, FusedGatedRMSNorm, FusedRMSNorm
from inlay.nn.delta_rule import FusedDeltaRule
from inlay.state import tuned_linears

from .tiny import first_tensor, tiny_model

FUSED = {
    "norms": FusedRMSNorm | FusedGatedRMSNorm,
    "MLPs": FusedGatedMLP,
    "attention": FusedAttention,
    "delta rule": FusedDeltaRule,
}
#: fp32, relative to the largest: other sums in another order, through a few layers.
TOLERANCE = 2e-4


@dataclass
class Finding:
    """What one architecture gets.

    Attributes:
        model_class: what was built. targets: S²FT's defaults, or the refusal. fused: blocks of each kind.
        linears: how many LoRA on all linears tunes. excluded: linears whose weight is read instead of called.
        faults: what is wrong; empty where everything holds.
    """

    model_type: str
    model_class: str = ""
    targets: str = ""
    fused: dict[str, int] = field(default_factory=dict)
    linears: int = 0
    excluded: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def examine(model_type: str) -> Finding:
    """Tune, run, differentiate, save and load a tiny model of ``model_type``; raises only if it cannot be built."""
    model, inputs = tiny_model(model_type)
    found = Finding(model_type, type(model).__name__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for check in (_targets, _lora, _gradients, _files):
            try:
                check(model, inputs, found)
            except Exception as error:
                if found.linears == 0 and re.search(r"all-linear|target_modules", str(error)):
                    return found  # nothing here that LoRA tunes, and the refusal says so
                found.faults.append(
                    f"{check.__name__.strip('_')}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
                )
    return found


def _readers(model: nn.Module, inputs: dict[str, Tensor], method: inlay.methods.Method, found: Finding) -> None:
    """Put the linears that inlay refuses to tune on ``found.excluded``; other refusals are raised."""
    while True:
        try:
            tuned = inlay.tune(copy.deepcopy(model), dataclasses.replace(method, **_excluding(found)))
            tuned.train()(**inputs)  # what is read in training only shows then
            return
        except ValueError as error:
            named = re.match(r"(\S+?)(: its \S+ reads its weight|\.weight is shared| belongs to a )", str(error))
            if named is None or named[1] in found.excluded:
                raise
            found.excluded.append(named[1])


def _excluding(found: Finding) -> dict:
    return {"exclude_modules": list(found.excluded)} if found.excluded else {}


def _default_targets(model: nn.Module, inputs: dict[str, Tensor], found: Finding) -> str:
    """The endings of what S²FT tunes by default, or its refusal, which must name what to pass."""
    method = inlay.S2FT(ratio=0.25)
    try:
        _readers(model, inputs, method, found)
    except ValueError as error:
        text = " ".join(str(error).split())
        if not re.search(r"target_modules|exclude_modules|granularity", text):
            found.faults.append(f"default targets: {text[:160]}")
        return "refused: " + text[:60]
    tuned = inlay.tune(copy.deepcopy(model), dataclasses.replace(method, **_excluding(found)))
    names = Counter(re.sub(r"(^|.*\.)\d+\.", "", name) for name in tuned_linears(tuned))
    return ", ".join(f"{name} {count}" for name, count in names.items())


def _targets(model: nn.Module, inputs: dict[str, Tensor], found: Finding) -> None:
    found.targets = _default_targets(model, inputs, found)


def _tuned(model: nn.Module, found: Finding, **options: bool) -> nn.Module:
    """LoRA on all linears but those that cannot be tuned."""
    return inlay.tune(copy.deepcopy(model), inlay.LoRA(r=2, **_excluding(found)), **options)


def _shake(tuned: nn.Module) -> None:
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in tuned_linears(tuned).values():
            b = module.deltas["default"].lora_B
            b.copy_(0.1 * torch.randn(b.shape, generator=random))


def _lora(model: nn.Module, inputs: dict[str, Tensor], found: Finding) -> None:
    """No logit moves at ``tune``, in eval and in training mode."""
    _readers(model, inputs, inlay.LoRA(r=2), found)
    tuned = _tuned(model, found)
    found.linears = len(tuned_linears(tuned))
    found.fused = {what: sum(isinstance(m, kind) for m in tuned.modules()) for what, kind in FUSED.items()}
    with torch.no_grad():
        for mode in (False, True):
            torch.manual_seed(0)
            wanted = first_tensor(copy.deepcopy(model).train(mode)(**inputs))
            torch.manual_seed(0)
            _compare(first_tensor(tuned.train(mode)(**inputs)), wanted, f"logits, train={mode}", found)
    model.eval()


def _gradients(model: nn.Module, inputs: dict[str, Tensor], found: Finding) -> None:
    """Gradients of the deltas are those of the same model without any fused block."""
    grads = []
    for options in ({}, {"fused_blocks": False, "fused_loss": False}):
        tuned = _tuned(model, found, **options).eval()
        _shake(tuned)
        torch.manual_seed(0)  # some draw random masks
        out = first_tensor(tuned(**inputs))
        if not out.requires_grad:
            return  # what is tuned feeds another output
        random = torch.Generator().manual_seed(9)
        out.backward(torch.randn(out.shape, generator=random))
        grads.append({name: p.grad for name, p in tuned.named_parameters() if ".deltas." in name})
    for name, wanted in grads[1].items():
        got = grads[0][name]
        if (got is None) != (wanted is None):
            found.faults.append(f"gradient of {name}: {'none' if got is None else 'one'} with fused blocks")
        elif wanted is not None:
            _compare(got, wanted, f"gradient of {name}", found, scale=5 * float(wanted.abs().max()) + 5e-3)


def _files(model: nn.Module, inputs: dict[str, Tensor], found: Finding) -> None:
    """Saved and loaded it is the same."""
    tuned = _tuned(model, found).eval()
    _shake(tuned)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tuned.save_pretrained(folder)
        loaded = inlay.load(copy.deepcopy(model), folder).eval()
        outputs = []
        for each in (loaded, tuned):
            torch.manual_seed(0)
            outputs.append(first_tensor(each(**inputs)))
        _compare(*outputs, "logits after loading", found)


def _compare(ours: Tensor, wanted: Tensor, what: str, found: Finding, scale: float | None = None) -> None:
    scale = float(wanted.abs().max()) if scale is None else scale
    error = float((ours.detach() - wanted.detach()).abs().max())
    if not error <= TOLERANCE * max(scale, 1e-6):
        found.faults.append(f"{what}: {error / max(scale, 1e-6):.1e} off")
