"""What embeddings do with the rows of their tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.probe import close, generator, shallow, takes_only


@dataclass(frozen=True)
class Lookup:
    """What an embedding does with the rows of its table: ``scale·table[ids]``, no gradient to row ``padding``.

    Attributes:
        scales: the scale in each dtype, as modules round it that keep it in a tensor (Gemma's).
    """

    scales: Mapping[torch.dtype, float]
    padding: int | None

    def scale(self, y: Tensor) -> float:
        """The scale of an output ``y``."""
        return self.scales[y.dtype]


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def lookup_of(module: nn.Module, where: str) -> Lookup:
    """How ``module`` looks rows up, found by running it on a small table.

    Raises:
        ValueError: it is no embedding, its table is packed or computed, or it does something else with it.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Embedding) or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise ValueError(f"{where}: wanted an nn.Embedding with a [tokens, width] table, got {type(module).__name__}")
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"{where}: its table is stored packed, as {weight.dtype} ({type(module).__name__}), and a change of it "
            "could not be merged; load the model with dense embeddings, or tune its linears"
        )
    if not takes_only(module, ()) or module.max_norm is not None:
        raise ValueError(
            f"{where}: wanted an embedding that takes token ids alone and keeps its table as it is, got a "
            f"{type(module).__name__} with other arguments, max_norm or a forward that was replaced; choose another"
        )
    scale = 1.0 if weight.is_meta else _scale(module, where)
    scales = {dtype: float(torch.tensor(scale, dtype=torch.float64).to(dtype)) for dtype in _DTYPES}
    return Lookup(scales, module.padding_idx)


@torch.no_grad()
def _scale(module: Any, where: str) -> float:
    table = torch.randn(5, 3, generator=generator())
    table[0] = 1.0  # of which the number is the product, without a rounding
    table = table.to(module.weight.device)
    twin = shallow(module, {}, {"weight": table})
    twin.__dict__.update(padding_idx=None, num_embeddings=5, embedding_dim=3)
    if "active" in twin.__dict__:  # it holds pieces already
        twin.__dict__["active"] = ()
    try:
        y = twin(torch.arange(5, device=table.device))
    except Exception:
        y = None
    if isinstance(y, Tensor) and y.shape == table.shape and close(y, float(y[0, 0]) * table):
        return float(y[0, 0])
    raise ValueError(
        f"{where}: a {type(module).__name__} computes something else than rows of its table times a number, so that a "
        "change of the table cannot be added to what it returns; name another embedding"
    )
