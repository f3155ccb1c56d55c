"""Rotary embedding against float64; memory layout; partial rotary."""

import pytest
import torch
from _compare import DTYPES, assert_as_good, assert_bits, grads, wide

from inlay import ops


def _eager(x, cos, sin):
    """transformers' apply_rotary_pos_emb on the first R channels."""
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = cos.shape[-1] // 2
    turned = torch.cat((-rotated[..., half:], rotated[..., :half]), dim=-1)
    return torch.cat((rotated * cos.unsqueeze(1) + turned * sin.unsqueeze(1), rest), dim=-1)


def _case(dtype, angle_dtype, batch=2, heads=(6, 2), tokens=5, width=20, rotary=20, angle_batch=1):
    q, k = (torch.randn(batch, tokens, h, width).to(dtype).transpose(1, 2).requires_grad_() for h in heads)
    angles = torch.randn(angle_batch, tokens, rotary) * 3
    return q, k, angles.cos().to(angle_dtype), angles.sin().to(angle_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide_angles", [False, True])
@pytest.mark.parametrize(
    "shape", [{}, {"rotary": 6}, {"angle_batch": 2}, {"width": 2, "rotary": 2}, {"tokens": 0}, {"rotary": 0}]
)
def test_against_float64(path, dtype, wide_angles, shape):
    q, k, cos, sin = _case(dtype, torch.float32 if wide_angles else dtype, **shape)
    cotangents = [torch.randn(x.shape).to(dtype) for x in (q, k)]
    q64, k64 = (t.requires_grad_() for t in wide(q, k))
    cos64, sin64 = wide(cos, sin)
    exact = _eager(q64, cos64, sin64), _eager(k64, cos64, sin64)
    eager = tuple(_eager(x, cos.to(dtype), sin.to(dtype)) for x in (q, k))
    ours = ops.rope(q, k, cos, sin)
    for name, got, plain, wanted in zip(("q", "k"), ours, eager, exact, strict=True):
        assert_as_good(got, plain, wanted, name)
        assert got.transpose(1, 2).is_contiguous()
    for name, got, plain, wanted in zip(
        ("dq", "dk"),
        grads(ours, [q, k], cotangents),
        grads(eager, [q, k], cotangents),
        grads(exact, [q64, k64], cotangents),
        strict=True,
    ):
        assert_as_good(got, plain, wanted, name)


def test_any_strides(path):
    q, k, cos, sin = _case(torch.bfloat16, torch.float32)
    wanted = ops.rope(q, k, cos, sin)
    spread = torch.empty(*q.shape, 2, dtype=q.dtype)[..., 0].copy_(q.detach())
    for view in (q.contiguous(), spread):
        assert_bits(ops.rope(view, k, cos, sin)[0], wanted[0])


def test_inverse_undoes_a_rotation(path):
    q, k, cos, sin = _case(torch.float32, torch.float32)
    cos, sin = (torch.cat((t[..., :10], t[..., :10]), dim=-1) for t in (cos, sin))
    torch.testing.assert_close(ops.rope(*ops.rope(q, k, cos, sin), cos, -sin)[0], q)


def test_bad_input(path):
    q, k, cos, sin = _case(torch.float32, torch.float32)
    with pytest.raises(ValueError, match="even number"):
        ops.rope(q, k, cos[..., :7], sin[..., :7])
    with pytest.raises(ValueError, match="cos: wanted"):
        ops.rope(q, k, cos[:, :3], sin[:, :3])
    with pytest.raises(TypeError, match="k: wanted"):
        ops.rope(q, k.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match="q, k"):
        ops.rope(q, k[0], cos, sin)
