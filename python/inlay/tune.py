"""``tune`` and ``load``: the front door. Turn a model into one whose chosen parts carry trainable pieces."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from torch import nn

from .adapters.load import load_onto
from .bases import BaseConfig
from .coverage import warn_about_experts
from .fingerprint import fingerprint
from .install import DEFAULT_ADAPTER, adopt_bitsandbytes, check_base_fits, check_sites, install
from .methods import Calibration, Method
from .model import with_methods
from .nn.int8 import check_int8, compute_in_int8
from .nn.use_check import check_by_probe
from .planning import completed
from .sites import LinearSite
from .state import disabled, sample_weights, state_of


def tune(
    model: nn.Module,
    method: Method,
    *,
    base: str | BaseConfig | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
    calibration: Calibration | None = None,
    fused_blocks: bool = True,
    fused_loss: bool = True,
    compute: str | None = None,
) -> nn.Module:
    """Freeze ``model`` and give the linears ``method`` targets a trainable delta. No logit changes before training.

    Changes ``model`` in place and returns the same object, which keeps its class and so works in any trainer, and
    gains ``print_trainable_parameters``, an adapter-only ``save_pretrained``, ``set_adapter`` and the like.

    Args:
        model: any module with ``nn.Linear`` or transformers ``Conv1D`` submodules, weights loaded, dense or quantized
            by inlay or bitsandbytes (whose linears become inlay's, with the same bytes).
        method: what to train, e.g. ``inlay.S2FT(ratio=0.03)``.
        base: "nf4", "fp4", "int8" or a :class:`inlay.BaseConfig`: quantize the frozen linears first (QLoRA). None
            leaves each as it is. Then the model changes by exactly the quantization error.
        adapter_name: name of the new adapter, which becomes the active one.
        calibration: batches of forward arguments, for methods that select by activation or gradient.
        fused_blocks: replace norms, gated MLPs and attention by the fused modules that partial backpropagation
            needs, where they are proven to compute the same. False leaves every other module as it is.
        fused_loss: compute the causal-LM loss without keeping logits, where it is proven to be the model's loss.
            In training mode ``outputs.logits`` is then not available; False brings it back.
        compute: "int8" multiplies the blocks' frozen weights in 8 bits, forward and input gradient, with a scale per
            token and per channel: products twice as fast where the CPU has them, and no longer exact (a loss some 1%
            higher to begin with; docs/performance.md). Nothing of it is saved. None multiplies in the model's dtype.

    Raises:
        TypeError: ``method`` is not a method config.
        ValueError: a target matches nothing, cannot be tuned, is shared or tied, or is tuned already; a module of
            ``modules_to_save`` is not there, quantized or tuned; ``compute`` is not for this machine or model.
    """
    _check_compute(model, compute, base)
    if not isinstance(method, Method):
        raise TypeError(f"method: wanted a config such as inlay.S2FT(ratio=0.03), got {type(method).__name__}")
    state = state_of(model)
    if state is not None and adapter_name in state.methods:
        raise ValueError(
            f"this model is tuned already with an adapter {adapter_name!r}; pass another adapter_name, "
            "or inlay.merge it first"
        )
    adopt_bitsandbytes(model)
    config = None if base is None else BaseConfig.of(base)
    with nullcontext() if state is None else disabled(model):  # choose by the base, whatever else is tuned
        method = method.settled(model, calibration, base)
        plan = method.plan(model, calibration)
    method, plan = completed(model, method, plan, config)
    check_sites(model, [site.path for site in plan.pieces])
    check_by_probe(model, [site.path for site in plan.pieces if isinstance(site, LinearSite)])
    pieces = {site.path: build(site.module(model)) for site, build in plan.pieces.items()}
    check_base_fits(model, method, pieces, config)
    sample, marks = sample_weights(model, list(pieces)), fingerprint(model, list(pieces), plan.whole)
    warn_about_experts(model, [] if config is not None else [*pieces, *plan.whole])
    if config is not None:
        method.quantize(model, config.leaving(plan.whole), pieces)
    install(
        model,
        method,
        pieces,
        adapter_name,
        sample=sample,
        marks=marks,
        base=config,
        whole=plan.whole,
        schedule=plan.schedule,
        fused_blocks=fused_blocks,
        fused_loss=fused_loss,
    )
    if compute is not None:
        compute_in_int8(model)
    return with_methods(model)


def _check_compute(model: nn.Module, compute: str | None, base: str | BaseConfig | None) -> None:
    if compute not in (None, "int8"):
        raise ValueError(f'compute: wanted "int8" or None, got {compute!r}')
    if compute is not None and base is not None:
        raise ValueError(f'compute="int8" wants dense weights, got base={base!r}; leave one of the two out')
    if compute is not None:
        check_int8(model)


def load(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str = DEFAULT_ADAPTER,
    base: str | BaseConfig | None = None,
    check_base: bool = True,
    trainable: bool = True,
    fused_blocks: bool = True,
    fused_loss: bool = True,
) -> nn.Module:
    """Put the adapter in ``directory`` on ``model`` (plain or tuned), in place, and make it the active one.

    Args:
        model: the base model the adapter was trained on.
        base: quantize the model's linears first, as for :func:`tune`.
        name: adapter name on this model; several adapters may share a base.
        check_base: compare a few base weights with those the adapter was trained on.
        trainable: False freezes the adapter after loading.
        fused_blocks, fused_loss: as for :func:`tune`.

    Raises:
        ValueError: files missing, corrupt, of an unknown method or newer format; tensors that do not fit; another base.
    """
    load_onto(
        model,
        directory,
        name=name,
        base=base,
        check_base=check_base,
        trainable=trainable,
        fused_blocks=fused_blocks,
        fused_loss=fused_loss,
    )
    return with_methods(model)
