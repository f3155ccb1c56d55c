"""Gated activations of experts, of one matrix ``gu [R, 2I]`` that holds gate and up: side by side, or interleaved.

  "silu", "gelu_tanh", "gelu"   h = act(gate)·up                                               as ops/swiglu.py has it
  "clamped"                     h = (clamp(up, ±limit) + plus)·g·sigmoid(alpha·g), g = min(gate, limit)

"clamped" is GPT-OSS's (alpha 1.702, limit 7, plus 1; transformers' ``GptOssExperts._apply_gate``) and that of models
which clamp before SiLU (alpha 1, plus 0). Math in fp32, one rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay._native import module
from inlay.ops._registry import compute_dtype, fail, raw_op
from inlay.ops.swiglu import ACTIVATIONS, swiglu_backward, swiglu_forward


@dataclass(frozen=True)
class Gate:
    """How an expert's gate and up become its inner activation; see above."""

    act: str
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = float("inf")
    plus: float = 0.0

    def __post_init__(self) -> None:
        if self.act not in (*ACTIVATIONS, "clamped"):
            fail("expert_gate", "act", f"one of {(*ACTIVATIONS, 'clamped')}", repr(self.act), "pass what the block has")

    def forward(self, gu: Tensor) -> Tensor:
        """h ``[R, I]`` of ``gu [R, 2I]``."""
        gate, up = halves(gu, self.interleaved)
        if self.act == "clamped":
            return clamped_forward(gate, up, self.alpha, self.limit, self.plus)
        return swiglu_forward(gate, up, self.act)

    def backward(self, dh: Tensor, gu: Tensor) -> Tensor:
        """The gradient of gu ``[R, 2I]`` from that of h."""
        return expert_gate_backward(dh, gu, self.act, self.interleaved, self.alpha, self.limit, self.plus)


def halves(gu: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and up, views of ``gu [..., 2I]``."""
    if interleaved:
        return gu[..., ::2], gu[..., 1::2]
    return gu[..., : gu.shape[-1] // 2], gu[..., gu.shape[-1] // 2 :]


def clamped_forward(gate: Tensor, up: Tensor, alpha: float, limit: float, plus: float) -> Tensor:
    """The clamped activation of gate, up ``[R, I]``."""
    wide = compute_dtype(gate)
    g, u = gate.to(wide).clamp(max=limit), up.to(wide).clamp(-limit, limit)
    return ((u + plus) * g * torch.sigmoid(alpha * g)).to(gate.dtype)


def _clamped_backward(
    dh: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float, plus: float
) -> tuple[Tensor, Tensor]:
    wide = compute_dtype(gate)
    dh, gate, up = dh.to(wide), gate.to(wide), up.to(wide)
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = torch.sigmoid(alpha * g)
    dgate = dh * (u + plus) * sigmoid * (1 + alpha * g * (1 - sigmoid))
    dup = dh * g * sigmoid
    return dgate.masked_fill(gate > limit, 0.0), dup.masked_fill(up.abs() > limit, 0.0)


def _native(dh: Tensor, gu: Tensor, act: str, interleaved: bool, alpha: float, limit: float, plus: float) -> Tensor:
    fits = gu.is_cpu and act != "clamped" and not interleaved and gu.is_contiguous() and dh.is_contiguous()
    if not fits:
        return expert_gate_backward.reference(dh, gu, act, interleaved, alpha, limit, plus)
    out, none = torch.empty_like(gu), torch.empty(0, dtype=torch.int64)
    (dgate, dup), (gate, up) = halves(out, False), halves(gu, False)
    module().swiglu_backward(dgate, dup, gu.new_empty(gu.shape[0], 0), dh, gate, up, none, ACTIVATIONS.index(act))
    return out


@raw_op(native=_native, fake=lambda dh, gu, *rest: torch.empty_like(gu, memory_format=torch.contiguous_format))
def expert_gate_backward(
    dh: Tensor, gu: Tensor, act: str, interleaved: bool, alpha: float, limit: float, plus: float
) -> Tensor:
    """dh [R, I], gu [R, 2I] -> the gradient of gu."""
    gate, up = halves(gu, interleaved)
    if act == "clamped":
        dgate, dup = _clamped_backward(dh, gate, up, alpha, limit, plus)
    else:
        dgate, dup, _ = swiglu_backward(dh, gate.contiguous(), up.contiguous(), act, None)
    out = torch.empty_like(gu, memory_format=torch.contiguous_format)
    for to, part in zip(halves(out, interleaved), (dgate, dup)):
        to.copy_(part)
    return out
