"""The gated delta rule (Yang, Kautz, Hatamizadeh, Gated Delta Networks, ICLR 2025, arXiv:2412.06464, equation 10).

  S_t = e^g_t·S_(t-1) + k_t·(beta_t·(v_t − e^g_t·S_(t-1)ᵀ·k_t))ᵀ        out_t = scale·S_tᵀ·q_t

Tokens are worked through in chunks of 64: with G the sums of g within a chunk and S the state before it,

  U = (I + A)⁻¹·diag(beta)·(V − diag(e^G)·K·S)      A[i, j] = beta_i·(k_i·k_j)·e^(G_i − G_j), j < i
  out = diag(e^G)·Q·S + P·U                         P[i, j] = (q_i·k_j)·e^(G_i − G_j), j ≤ i
  S' = e^(G_n)·S + Kᵀ·diag(e^(G_n − G))·U

Math in fp32 and one rounding of what has q's dtype. Kept for the backward: q, k, v, g, beta; states are rebuilt there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from inlay._native import available as _native_available
from inlay._native import module
from inlay.ops._registry import (
    apply,
    check_device,
    check_floating,
    check_same,
    compute_dtype,
    fail,
    raw_op,
    unit_inner,
    without_autocast,
)

CHUNK = 64


def kernel_fits(q: Tensor) -> bool:
    """True if our own kernel would be the faster one for ``q``, were it on this CPU."""
    wanted = q.dtype in (torch.float32, torch.bfloat16, torch.float16) and _native_available()
    # A graph is traced once, and the instruction set asked for outside it.
    return wanted and (torch.compiler.is_compiling() or module().isa() != "scalar")


def has_own_kernel(q: Tensor) -> bool:
    """True where our own kernel runs, and is faster than torch's products in a loop."""
    return q.is_cpu and kernel_fits(q)


def workspace_bytes(q: Tensor, v: Tensor) -> int:
    """What a thread's part of the backward takes, about: a state and U for each chunk of each head of a group."""
    chunks = -(-q.shape[1] // CHUNK)
    return 4 * (v.shape[2] // q.shape[2]) * chunks * v.shape[3] * (q.shape[3] + CHUNK)


# --- the reference -------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """``[B, H, n, ...]`` of a chunk: what of it does not depend on the state."""

    q: Tensor  # normalized and scaled
    k: Tensor  # normalized
    v: Tensor
    beta: Tensor  # [B, H, n, 1]
    grown: Tensor  # e^G, and e^(G_n − G): [B, H, n, 1]
    left: Tensor
    last: Tensor  # e^(G_n): [B, H, 1, 1]
    decay: Tensor  # e^(G_i − G_j) below the diagonal, 1 on it: [B, H, n, n]

    def system(self) -> Tensor:
        """A of the triangular system I + A."""
        return (self.beta * (self.k @ self.k.mT) * self.decay).tril(-1)

    def scores(self) -> Tensor:
        return (self.q @ self.k.mT) * self.decay

    def updates(self, state: Tensor) -> Tensor:
        rows = self.beta * (self.v - self.grown * (self.k @ state))
        return torch.linalg.solve_triangular(self.system(), rows, upper=False, unitriangular=True)

    def out(self, state: Tensor, u: Tensor) -> Tensor:
        return self.grown * (self.q @ state) + self.scores() @ u

    def advanced(self, state: Tensor, u: Tensor) -> Tensor:
        return self.last * state + self.k.mT @ (self.left * u)


def _heads(x: Tensor, count: int, wide: torch.dtype) -> Tensor:
    """``[B, T, G, ...]`` as ``[B, count, T, ...]``, each head as often as its group has heads."""
    return x.to(wide).repeat_interleave(count // x.shape[2], 2).transpose(1, 2)


def _inverse_norm(x: Tensor, normalize: bool, eps: float) -> Tensor | float:
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + eps) if normalize else 1.0


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, normalize: bool, eps: float
) -> Iterator[_Chunk]:
    wide, heads = compute_dtype(q), v.shape[2]
    q, k, v, g, beta = (_heads(x, heads, wide) for x in (q, k, v, g, beta))
    q, k = (x * _inverse_norm(x, normalize, eps) for x in (q, k))
    q = q * scale
    for part in range(0, q.shape[2], CHUNK):
        rows, keys, values, gates, betas = (x[:, :, part : part + CHUNK] for x in (q, k, v, g, beta))
        sums = gates.double().cumsum(-1)
        decay = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril().to(wide)
        grown, left = (t.exp().to(wide)[..., None] for t in (sums, sums[..., -1:] - sums))
        yield _Chunk(rows, keys, values, betas[..., None], grown, left, grown[..., -1:, :], decay)


def _initial(q: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    wide = compute_dtype(q)
    return q.new_zeros(_state_shape(q, v), dtype=wide) if state is None else state.to(wide)


def _state_shape(q: Tensor, v: Tensor) -> tuple[int, ...]:
    return q.shape[0], v.shape[2], q.shape[3], v.shape[3]


def _forward_native(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, scale: float, norm: bool, eps: float
) -> tuple[Tensor, Tensor]:
    out, final = _forward_fake(q, k, v, g, beta, state, scale, norm, eps)
    inputs = *(unit_inner(t) for t in (q, k, v)), g, beta, None if state is None else state.contiguous()
    module().gated_delta_rule_forward(out, final, *inputs, scale, norm, eps)
    return out, final


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, scale: float, norm: bool, eps: float
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(_state_shape(q, v), dtype=compute_dtype(q))


@raw_op(native=_forward_native, fake=_forward_fake)
def gated_delta_rule_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, scale: float, norm: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, G, dk], v [B, T, H, dv], g, beta fp32 [B, T, H], state fp32 [B, H, dk, dv] -> out as v, last state"""
    carried, outs = _initial(q, v, state), []
    for chunk in _chunks(q, k, v, g, beta, scale, norm, eps):
        u = chunk.updates(carried)
        outs.append(chunk.out(carried, u))
        carried = chunk.advanced(carried, u)
    out = torch.cat(outs, 2).transpose(1, 2).to(v.dtype) if outs else v.new_empty(v.shape)
    return out.contiguous(), carried.clone(memory_format=torch.contiguous_format)


def _backward_native(
    dout: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    norm: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _backward_fake(dout, dfinal, q, k, v, g, beta, state, scale, norm, eps)
    state = None if state is None else state.contiguous()
    written = *grads[:5], None if state is None else grads[5]
    inputs = *(unit_inner(t) for t in (q, k, v)), g, beta, state
    module().gated_delta_rule_backward(*written, unit_inner(dout), dfinal.contiguous(), *inputs, scale, norm, eps)
    return grads


def _backward_fake(
    dout: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    norm: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = [t.new_empty(t.shape) for t in (q, k, v, g, beta)]
    dstate = q.new_empty(0 if state is None else state.shape, dtype=compute_dtype(q))
    return grads[0], grads[1], grads[2], grads[3], grads[4], dstate


@raw_op(native=_backward_native, fake=_backward_fake)
def gated_delta_rule_backward(
    dout: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    norm: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dout as v, dfinal [B, H, dk, dv] -> dq, dk, dv, dg, dbeta, dstate; the last has size 0 without a state."""
    chunks, states = list(_chunks(q, k, v, g, beta, scale, norm, eps)), [_initial(q, v, state)]
    for chunk in chunks:
        states.append(chunk.advanced(states[-1], chunk.updates(states[-1])))
    carried = dfinal.to(states[0].dtype)
    douts = dout.to(carried.dtype).transpose(1, 2).split(CHUNK, 2)
    found = []
    for chunk, before, grad in reversed(list(zip(chunks, states, douts))):
        *grads, carried = _backward_of(chunk, before, grad, carried)
        found.append(grads)
    return _as_inputs(found[::-1], carried, q, k, v, g, beta, state, scale, norm, eps)


def _backward_of(chunk: _Chunk, state: Tensor, dout: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
    """dq and dk of the chunk's rows, dv, dg, dbeta, and the gradient of the state before it."""
    q, k, v, beta, grown, left, last, decay = chunk
    u, system, scores = chunk.updates(state), chunk.system(), chunk.scores()
    du = scores.mT @ dout + left * (k @ dstate)
    dr = torch.linalg.solve_triangular(system.mT, du, upper=True, unitriangular=True)
    da, dp = -(dr @ u.mT).tril(-1), (dout @ u.mT).tril()
    dkk, dqk = beta * da * decay, dp * decay
    read_r, read_out, read_u = grown * (dr @ state.mT), grown * (dout @ state.mT), left * (u @ dstate.mT)
    dq = read_out + dqk @ k
    dk = read_u - beta * read_r + dqk.mT @ q + (dkk + dkk.mT) @ k
    along = (read_r * k).sum(-1)
    dbeta = (dr * v).sum(-1) - along + (da * decay * (k @ k.mT)).sum(-1)
    pairs = (da * system + dp * scores).tril(-1)
    added = (read_u * k).sum(-1)
    dsums = pairs.sum(-1) - pairs.sum(-2) - beta[..., 0] * along + (read_out * q).sum(-1) - added
    dsums[..., -1] += added.sum(-1) + last[..., 0, 0] * (state * dstate).sum((-1, -2))
    dg = dsums.flip(-1).cumsum(-1).flip(-1)
    before = last * dstate + q.mT @ (grown * dout) - k.mT @ (beta * grown * dr)
    return dq, dk, beta * dr, dg, dbeta, before


def _as_inputs(
    found: list,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    norm: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of chunks as those of the op's inputs: heads of a group added up, norms undone."""
    if not found:
        grads = [torch.zeros_like(t) for t in (q, k, v, g, beta)]
    else:
        dq, dk, *others = (torch.cat(parts, 2).transpose(1, 2) for parts in zip(*found, strict=True))
        pair = []
        for d, x, factor in ((dq, q, scale), (dk, k, 1.0)):
            d = d.unflatten(2, (x.shape[2], -1)).sum(3) * factor
            rows = x.to(d.dtype)
            inverse = _inverse_norm(rows, norm, eps)
            unit = rows * inverse
            pair.append(inverse * (d - unit * (unit * d).sum(-1, keepdim=True)) if norm else d)
        grads = [d.to(x.dtype).contiguous() for d, x in zip((*pair, *others), (q, k, v, g, beta), strict=True)]
    kept = dstate.new_empty(0) if state is None else dstate.clone(memory_format=torch.contiguous_format)
    return grads[0], grads[1], grads[2], grads[3], grads[4], kept


# --- the op --------------------------------------------------------------------------------------------------


class _GatedDeltaRule(Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor | None,
        scale: float,
        norm: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, g, beta, state)
        ctx.rest = scale, norm, eps
        return gated_delta_rule_forward(q, k, v, g, beta, state, scale, norm, eps)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        grads = gated_delta_rule_backward(dout, dfinal, *ctx.saved_tensors, *ctx.rest)
        wanted = (d if need else None for d, need in zip(grads, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> None:
    op = "gated_delta_rule"
    check_floating(op, "q", q)
    check_same(op, "k", k, "q", q, shape=True)
    check_same(op, "v", v, "q", q)
    fits = q.dim() == v.dim() == 4 and q.shape[:2] == v.shape[:2]
    if not fits or not q.shape[2] or not v.shape[2] or v.shape[2] % q.shape[2] or not q.shape[3] or not v.shape[3]:
        got = f"{tuple(q.shape)} and {tuple(v.shape)}"
        fail(op, "q, v", "[B, T, G, dk] and [B, T, H, dv], H a multiple of G", got, "split the heads first")
    for name, gate in (("g", g), ("beta", beta)):
        check_floating(op, name, gate)
        check_device(op, name, gate, "q", q)
        if gate.shape != v.shape[:3]:
            fail(op, name, f"shape {tuple(v.shape[:3])}", tuple(gate.shape), "pass one number per token and head")
    if state is not None:
        check_device(op, "initial_state", state, "q", q)
        if state.shape != _state_shape(q, v):
            fail(op, "initial_state", f"shape {_state_shape(q, v)}", tuple(state.shape), "pass [B, H, dk, dv]")


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``q`` and ``k [B, T, G, dk]``, ``v [B, T, H, dv]`` -> out as ``v``, and the state after the last token.

    Args:
        g, beta: float ``[B, T, H]``: the logarithm of each token's decay (at most 0), and how much of the state's
            value at its key it replaces.
        initial_state: ``[B, H, dk, dv]``, zeros if None. States are fp32.
        scale: of q, 1/sqrt(dk) if None.
        norm_eps: queries and keys are divided by sqrt(|x|² + norm_eps) first; None: they are taken as they are.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    _check(q, k, v, g, beta, initial_state)
    wide = compute_dtype(q)
    g, beta = g.to(wide), beta.to(wide)
    state = None if initial_state is None else initial_state.to(wide)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    eps = 0.0 if norm_eps is None else float(norm_eps)
    return apply(_GatedDeltaRule, q, k, v, g, beta, state, scale, norm_eps is not None, eps)
