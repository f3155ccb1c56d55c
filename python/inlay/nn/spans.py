"""Masks as stretches of keys: what lets attention run without reading a mask.

A mask is looked at once, whoever made it: causal, padded, packed samples and sliding windows all let a token see one
stretch of keys. Layers of one forward share it, so the answer is kept for as long as the mask lives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..ops.attention import mask_of

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # mask -> (its version, its spans or None)


def spans_of(mask: Tensor) -> Tensor | None:
    """The stretches that ``mask`` says, int64 ``[B or 1, T, 2]`` as :func:`inlay.ops.attention` takes them.

    Args:
        mask: ``[B or 1, 1, T, S]``, True where a token sees a key; or numbers that are added to scores, 0 where it does
            and the lowest of their dtype, or -inf, where it does not.

    Returns:
        None where it says something else: other numbers, a mask per head, gaps, or stretches that fall back. A token
        that sees no key has output 0, as torch's has; where numbers are added eager attention then sees all keys
        alike, so that None is returned.
    """
    if type(mask) is not Tensor or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    if mask.dtype != torch.bool and (not mask.is_floating_point() or mask.requires_grad):
        return None
    if mask.is_inference() or not mask.numel():
        return None  # an inference tensor does not tell when it is changed
    version, spans = _known.get(mask, (-1, None))
    if version != mask._version:
        spans = _measured(mask) if mask.dtype == torch.bool else _added(mask)
        _known[mask] = (mask._version, spans)
    return spans


def _added(mask: Tensor) -> Tensor | None:
    """Of numbers that are added."""
    if mask.stride(0) == 0:
        mask = mask[:1]
    seen = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min
    if not bool((seen | hidden).all()) or not bool(seen.any(-1).all()):
        return None
    return _measured(seen)


def _measured(mask: Tensor) -> Tensor | None:
    if mask.stride(0) == 0:
        mask = mask[:1]  # one for the whole batch
    begin, count = mask[:, 0].to(torch.uint8).argmax(-1), mask[:, 0].sum(-1)
    end = torch.where(count > 0, begin + count, 0).cummax(-1).values
    spans = torch.stack((torch.where(count > 0, begin, end), end), -1)  # an empty one lies where the last ended
    never_falls = bool((spans.diff(dim=1) >= 0).all())
    rows, keys = mask.shape[-2:]
    return spans if never_falls and torch.equal(mask_of(spans, rows, keys, mask.device), mask) else None
