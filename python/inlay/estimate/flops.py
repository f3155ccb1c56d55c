"""Floating-point operations of every product: torch's own formulas, and ours for the ops torch does not know.

A multiply and an add count as two. Causal attention counts the half of the scores that is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ..ops.attention import shares  # with it come torch.ops.inlay
from ..ops.expert_linear import expert_matmul_  # noqa: F401 (its registration)
from ..ops.gated_delta_rule import CHUNK, workspace_bytes

_aten, _inlay = torch.ops.aten, torch.ops.inlay

ATTENTION = {
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _inlay.attention_forward,
    _inlay.attention_backward,
    _inlay.gated_delta_rule_forward,
    _inlay.gated_delta_rule_backward,
}


def _scores(query: Tensor, key: Tensor, causal: bool) -> float:
    """Multiply-adds times two of one product with the scores: ``[B, H, T, D] x [B, H, S, D]``."""
    return 2 * prod(query.shape) * key.shape[-2] * (0.5 if causal else 1.0)


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, *rest: Any, **_: Any):
    return 2 * _scores(query, key, causal)


def _flash_cpu_backward(
    do: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *rest: Any, **_: Any
):
    return 5 * _scores(query, key, bool(rest[1]) if len(rest) > 1 else True)


def _flash_cuda_backward(do: Tensor, query: Tensor, key: Tensor, *rest: Any, **_: Any) -> float:
    return 5 * _scores(query, key, bool(rest[8]) if len(rest) > 8 else True)


def _own_forward(query: Tensor, key: Tensor, *rest: Any, **_: Any) -> float:
    return 2 * _scores(query, key, True)


def _own_backward(do: Tensor, query: Tensor, key: Tensor, *rest: Any, **_: Any) -> float:
    return 5 * _scores(query, key, True)


def _rule(q: Tensor, v: Tensor, states: int, keys: int, values: int) -> float:
    """Products of all tokens with states, and halves of chunks over the widths of keys and values."""
    dk, dv = q.shape[-1], v.shape[-1]
    return prod(v.shape[:-1]) * (2 * states * dk * dv + CHUNK * (keys * dk + values * dv))


def _rule_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> float:
    return _rule(q, v, 3, 2, 2)


def _rule_backward(dout: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> float:
    return _rule(q, v, 8, 7, 5)


def _submatrix_grad(dy: Tensor, x_sel: Tensor, **_: Any) -> int:
    return 2 * prod(dy.shape) * x_sel.shape[-1]


def _lora_backward(dy: Tensor, xa: Tensor, *rest: Any, **_: Any) -> int:
    return 4 * prod(dy.shape) * xa.shape[-1]


def _quantized_small(x: Tensor, *rest: Any, **_: Any) -> int:
    return 2 * prod(x.shape) * int(rest[-1])


def _addmm(y: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return 2 * prod(a.shape) * b.shape[-1]


def _expert_matmul(out: Tensor, lefts: list[Tensor], rights: list[Tensor], *rest: Any, **_: Any) -> int:
    return 2 * prod(out.shape) * sum(right.shape[1] for right in rights)


def _expert_grad(
    out: Tensor, left: Tensor, right: Tensor, left_rows: Tensor | None, right_rows: Tensor | None, *rest: Any, **_: Any
) -> int:
    rows = left if left_rows is None else left_rows
    return 2 * rows.shape[0] * prod(out.shape[1:])


#: FLOPs by op; each takes the op's arguments and ``out_val=``.
FORMULAS: dict[Any, Callable[..., float]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention: _flash,
    _aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_cpu_backward,
    _aten._scaled_dot_product_flash_attention_backward: _flash_cuda_backward,
    _aten.addmm_: _addmm,
    _inlay.attention_forward: _own_forward,
    _inlay.attention_backward: _own_backward,
    _inlay.gated_delta_rule_forward: _rule_forward,
    _inlay.gated_delta_rule_backward: _rule_backward,
    _inlay.submatrix_grad: _submatrix_grad,
    _inlay.expert_grad_: _expert_grad,
    _inlay.expert_matmul_: _expert_matmul,
    _inlay.lora_backward: _lora_backward,
    _inlay.quantized_linear_small: _quantized_small,
}


def _own_backward_workspace(do: Tensor, query: Tensor, key: Tensor, *rest: Any) -> int:
    count = shares(query, key)
    return count * query.numel() * 4 if count > 1 else 0  # the shares' parts of dq, fp32, before they are summed


def _rule_workspace(dout: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    return workspace_bytes(q, v) * min(torch.get_num_threads(), q.shape[0] * q.shape[2])


#: Bytes an op uses inside and gives back before it returns.
HIDDEN_WORKSPACE: dict[Any, Callable[..., int]] = {
    _inlay.attention_backward: _own_backward_workspace,
    _inlay.gated_delta_rule_backward: _rule_workspace,
}


def part_of(packet: Any, roles: set[str | None], stage: str, in_loss: bool) -> str:
    """Which line of the table a product belongs to.

    Args:
        roles: what its operands are: "head", "delta", "base" or None. stage: "forward", "recomputed" or "backward".
    """
    if "head" in roles or in_loss:
        return "loss"
    if stage == "recomputed":
        return "recomputed"
    if packet in ATTENTION or (not roles & {"delta", "base"} and packet in (_aten.bmm, _aten.baddbmm)):
        return f"attention {stage}"
    if "delta" in roles and not (
        packet is _inlay.expert_matmul_ and "base" in roles
    ):  # of both, the base is the wide one
        return "delta forward" if stage == "forward" else "delta gradients"
    if "base" in roles:
        return "linears forward" if stage == "forward" else "linears dX"
    return "delta gradients" if stage == "backward" or packet is _inlay.submatrix_grad else "other"
