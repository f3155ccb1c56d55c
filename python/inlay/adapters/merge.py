"""Merge: from a tuned model back to plain modules, with the adapter in the weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.quantized import QuantizedLinear, QuantizedWeight, dense_linear
from ..nn.tuned_linear import TunedLinear
from ..nn.tuned_output import TunedOutput, release
from ..nn.tuned_quantized import TunedQuantizedLinear
from ..nn.whole import settle_whole
from ..state import make_plain, require_state, state_of, tuned_modules
from ..ties import tie_again, ties_of
from .originals import find_originals


@torch.no_grad()
def merge(
    model: nn.Module,
    *,
    in_place: bool = False,
    originals: str | Path | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A plain dense model whose weights contain the active adapters: original classes, dtype and channel order.

    ``W[:, I] = round(float(W[:, I]) + V)``: one rounding, into the weight's own dtype.

    On a quantized base the adapter goes into the dense weights that were quantized, read tensor by tensor from
    ``originals`` or from where the model was loaded; if they are not at hand, into the dequantized weights, with a
    warning. Never back into four bits, which would round the adapter away.

    Args:
        in_place: turn ``model`` itself into the plain model instead of a copy, which needs no second set of weights.
        originals: directory of the dense checkpoint a quantized model was made from.
        inputs: keyword arguments of a forward: how far the merged model's logits are off is measured on them and
            printed.

    Raises:
        TypeError: the model is not tuned.
        ValueError: ``originals`` are not this model's, or cannot take this adapter; or no weights compute what an
            active piece does.
    """
    state = require_state(model, "merge")
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantizedWeight)]
    bound = [state.methods[name].needs_base for name in state.active if state.methods[name].needs_base]
    if bound and originals is not None:
        raise ValueError(
            f"{bound[0]} moved a part of the dense weights into the adapter, so that adding it to the originals would "
            "count that part twice; merge without originals"
        )
    source = find_originals(model, originals, packed) if packed and not bound else None
    if in_place and source is not None:
        for name in packed:
            source.weight(name, model.get_submodule(name))  # raises before anything changes
    check_merge(model)
    before = _logits(model, inputs)
    plain = model if in_place else copy.deepcopy(model)
    settle_whole(plain)
    ties = ties_of(plain, tuned_modules(plain))
    later = {path for places in ties for path, _ in places[1:]}  # which get the weight of the first
    for name, module in tuned_modules(plain).items():
        if isinstance(module, TunedOutput):
            release(module) if name in later else module.settle()
        elif isinstance(module, TunedLinear) and not isinstance(module, TunedQuantizedLinear):
            plain.set_submodule(name, module.unwrapped() if name in later else module.to_plain())
    tie_again(plain, ties)
    worst = 0.0
    for name in packed:
        module = plain.get_submodule(name)
        dense = _dense(module, None if source is None else source.weight(name, module))
        if source is None:
            worst = max(worst, _rounding(module, dense))
        plain.set_submodule(name, dense)
    make_plain(plain)
    _forget_quantization(plain)
    after = _logits(plain, inputs)
    difference = None if before is None or after is None else float((after - before).abs().max())
    if packed:
        _tell(None if source is None else source.directory, difference, worst, bool(bound))
    elif difference is not None:
        print(f"inlay: merged; max |Δlogit| {difference:.3e}")
    return plain


def check_merge(model: nn.Module) -> None:
    """ValueError if an active piece cannot be merged into its module; nothing has changed then."""
    for name, module in tuned_modules(model).items():
        for piece in module.active_deltas():
            try:
                piece.check_merge(getattr(module, "bias", None))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def _dense(module: nn.Module, onto: Tensor | None) -> nn.Module:
    """A dense module for a quantized one, tuned or not; with ``onto`` as its base weight if given."""
    if isinstance(module, TunedQuantizedLinear):
        return module.to_plain(onto)
    assert isinstance(module, QuantizedLinear)
    weight = module.dense_base(module.compute_dtype) if onto is None else onto
    return dense_linear(weight, module.bias, module.conv1d).train(module.training)


def _rounding(module: nn.Module, dense: nn.Module) -> float:
    """Relative Frobenius norm of what storing the merged weight in its dtype rounds away."""
    if not isinstance(module, TunedQuantizedLinear):
        return 0.0
    exact, _ = module.merged_onto(module.dense_base(torch.float32))
    stored = dense.weight.t() if module.conv1d else dense.weight
    return float((stored.float() - exact).norm() / exact.norm().clamp_min(1e-30))


def _logits(model: nn.Module, inputs: Mapping[str, Any] | None) -> Tensor | None:
    if inputs is None:
        return None
    training = model.training
    model.eval()
    try:
        return model(**inputs).logits.float()
    finally:
        model.train(training)


def _tell(directory: Path | None, difference: float | None, rounding: float, bound: bool) -> None:
    measured = "" if difference is None else f"; max |Δlogit| against the quantized model: {difference:.3e}"
    if directory is not None:
        print(f"inlay: merged into the original weights of {directory}{measured}")
        return
    reason = "LoftQ's base is part of the adapter" if bound else "the original dense weights are not at hand"
    advice = "" if bound else "; pass originals= their directory to be rid of it"
    warnings.warn(
        f"merged into dequantized weights, since {reason}: the merged model keeps the quantization error{advice}; "
        f"storing the weights densely rounds away {rounding:.1e} of them{measured}",
        stacklevel=3,
    )


def _forget_quantization(model: nn.Module) -> None:
    """A dense model must not be saved as a quantized one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if state_of(model) is None and quantizer is not None and type(quantizer).__module__.startswith("inlay."):
        quantizer.remove_quantization_config(model)
