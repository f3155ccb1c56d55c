"""LoRA on any base: forward and gradients against autograd in float64, and every way to call it."""

import pytest
import torch
from _compare import DTYPES, UNIT, assert_as_good, assert_bits, grads, padded_rows, strided, wide
from torch.nn import functional

from inlay.bases import FourBit, Int8
from inlay.ops import DenseBase, DenseBaseT, swiglu
from inlay.ops.lora_linear import lora_add_, lora_linear, swiglu_lora_linear

RANKS = (1, 4, 8, 16, 40, 64)
ROWS = (1, 2, 7, 8, 9, 16, 17, 63, 64, 65, 255)
BASES = ("dense", "conv1d", "nf4", "nf4-nested", "fp4", "int8")


def make_base(kind, out, width, dtype, bias=True):
    """A base, its tensors, and its weight in float64 as the products in `dtype` may see it: unrounded."""
    weight = (torch.randn(out, width) / width**0.5).to(dtype)
    b = torch.randn(out).to(dtype) if bias else None
    if kind == "dense":
        return DenseBase, (weight, b), weight.double()
    if kind == "conv1d":
        return DenseBaseT, (weight.t().contiguous(), b), weight.double()
    four_bit = FourBit(out, width, kind[:3] if kind != "int8" else "nf4", 32, kind.endswith("nested"))
    base = Int8(out, width) if kind == "int8" else four_bit
    tensors = (*base.quantize(weight, kind), b)
    return base, tensors, base.dequantize(torch.float32, *tensors).double()


def factors(rank, out, width):
    a, b = torch.randn(rank, width) / width**0.5, torch.randn(out, rank) / rank**0.5
    return a.requires_grad_(), b.requires_grad_()


def plain(x, a, b, scale, weight, bias):
    """In x's dtype, the way eager code has it: factors cast, product added."""
    cast = [t.to(x.dtype) for t in (a, b)]
    bias = None if bias is None else bias.to(x.dtype)
    return functional.linear(x, weight.to(x.dtype), bias) + scale * functional.linear(
        functional.linear(x, cast[0]), cast[1]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("rank", RANKS)
def test_against_float64(path, dtype, kind, rank):
    out, width, scale = 37, 101, 1.7
    base, tensors, exact_weight = make_base(kind, out, width, dtype, bias=rank % 8 == 0)
    bias = tensors[-1]
    for rows in (1, 9, 65):
        x = torch.randn(rows, width).to(dtype).requires_grad_()
        a, b = factors(rank, out, width)
        dy = torch.randn(rows, out)
        x64, a64, b64 = (t.requires_grad_() for t in wide(x, a, b))
        exact = plain(x64, a64, b64, scale, exact_weight, bias)
        eager = plain(x, a, b, scale, exact_weight, bias)
        ours = lora_linear(x, a, b, scale, base, *tensors)
        assert_as_good(ours, eager, exact, f"forward, {rows} rows", slack=3)
        got, cotangent = grads(ours, [x, a, b], [dy]), [dy.to(dtype)]
        wanted = grads(exact, [x64, a64, b64], cotangent)
        near = grads(eager, [x, a, b], cotangent)
        for name, g, n, w in zip(("dx", "dA", "dB"), got, near, wanted, strict=True):
            assert g.dtype == (dtype if name == "dx" else torch.float32)
            # One row: each row of dA is one inner product dy·B times x, and has the error of B's cast in that.
            cast = UNIT[dtype] * scale * float((dy.abs() @ b.detach().abs()).mean() * x.detach().abs().mean())
            atol = cast if (name, rows) == ("dA", 1) else 1e-30
            assert_as_good(g, n, w, f"{name}, {rows} rows", slack=4, atol=atol)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("rows", ROWS)
def test_rows(path, kind, rows):
    """Relative error over all of it, in bf16; the branch, and so its error, is as large as the base's product here."""
    base, tensors, weight = make_base(kind, 96, 160, torch.bfloat16)
    x = torch.randn(rows, 160).bfloat16().requires_grad_()
    a, b = factors(16, 96, 160)
    x64, a64, b64 = (t.requires_grad_() for t in wide(x, a, b))
    exact = plain(x64, a64, b64, 2.0, weight, tensors[-1])
    ours = lora_linear(x, a, b, 2.0, base, *tensors)
    assert float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm()) <= 3.5e-3
    dy = torch.randn(rows, 96).bfloat16()
    for name, got, wanted in zip(
        ("dx", "dA", "dB"), grads(ours, [x, a, b], [dy]), grads(exact, [x64, a64, b64], [dy]), strict=True
    ):
        error = float((got.double() - wanted).norm() / wanted.norm())
        assert error <= (4e-3 if name == "dx" else 5e-3), f"{name}: {error:.2e}"


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_down_projection(path, kind, act):
    """swiglu_lora_linear keeps gate and up only, and equals the two ops one after the other."""
    dtype, out, width = torch.bfloat16, 24, 70
    base, tensors, _ = make_base(kind, out, width, dtype)
    gate, up = (torch.randn(2, 9, width).to(dtype).requires_grad_() for _ in range(2))
    a, b = factors(8, out, width)
    dy = torch.randn(2, 9, out)
    fused = swiglu_lora_linear(gate, up, act, a, b, 0.5, base, *tensors)
    unfused = lora_linear(swiglu(gate, up, act), a, b, 0.5, base, *tensors)
    assert_bits(fused, unfused, "forward")
    inputs = [gate, up, a, b]
    for name, got, wanted in zip(
        ("dgate", "dup", "dA", "dB"), grads(fused, inputs, [dy]), grads(unfused, inputs, [dy]), strict=True
    ):
        assert_bits(got, wanted, name)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu_lora_linear(gate, up, act, a, b, 0.5, base, *tensors)
    activations = {t.data_ptr() for t in kept if t is not None and t.dtype == dtype and t.dim() == 3}
    assert activations == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("kind", ["dense", "conv1d", "nf4", "int8"])
def test_gradcheck(kind):
    base, tensors, _ = make_base(kind, 5, 6, torch.float32)
    tensors = tuple(
        t.double() if kind in ("dense", "conv1d") or i == len(tensors) - 1 else t for i, t in enumerate(tensors)
    )
    x, up = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a, b = (t.detach().double().requires_grad_() for t in factors(2, 5, 6))
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, a, b, 1.5, base, *tensors), (x, a, b))
    assert torch.autograd.gradcheck(
        lambda x, up, a, b: swiglu_lora_linear(x, up, "gelu", a, b, 1.5, base, *tensors), (x, up, a, b)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_few_rows_are_added_in_one_call(path, dtype, rank):
    """The low-rank branch of decoding: into y's own memory, whatever its strides, with one rounding."""
    out, width, scale = 37, 1037, 0.6
    a, b = (t.detach() for t in factors(rank, out, width))
    for rows in (0, 1, 3, 16):
        x, y = torch.randn(rows, width).to(dtype), torch.randn(rows, out).to(dtype)
        x64, y64, a64, b64 = wide(x, y, a, b)
        eager = y + (scale * (x @ a.to(dtype).t()) @ b.to(dtype).t())
        for view in (torch.clone, padded_rows, strided):
            target = view(y)
            lora_add_(target, view(x), a, b, scale)
            assert_as_good(target, eager, y64 + scale * (x64 @ a64.t()) @ b64.t(), f"{rows} rows")


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_dropout(path, kind):
    """The low-rank branch reads what dropout left; gradients flow through both of x's uses."""
    base, tensors, weight = make_base(kind, 20, 64, torch.float32)
    x = torch.randn(11, 64, requires_grad=True)
    a, b = factors(4, 20, 64)
    mask = (torch.rand(11, 64) > 0.4) / 0.6
    dy = torch.randn(11, 20)
    ours = lora_linear(x, a, b, 0.7, base, *tensors, dropped=x * mask)
    exact = functional.linear(x, weight.float(), tensors[-1]) + 0.7 * (((x * mask) @ a.t()) @ b.t())
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(grads(ours, [x, a, b], [dy]), grads(exact, [x, a, b], [dy]))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_micro_batches_equal_one_batch(path, kind):
    base, tensors, _ = make_base(kind, 24, 96, torch.bfloat16)
    x, dy = torch.randn(64, 96).bfloat16(), torch.randn(64, 24).bfloat16()
    a, b = factors(8, 24, 96)

    def gradients(pieces):
        total = [torch.zeros_like(a), torch.zeros_like(b)]
        for part, cotangent in zip(x.chunk(pieces), dy.chunk(pieces), strict=True):
            for sum_, g in zip(
                total, grads(lora_linear(part, a, b, 2.0, base, *tensors), [a, b], [cotangent]), strict=True
            ):
                sum_.add_(g)
        return total

    for one, many in zip(gradients(1), gradients(4), strict=True):
        assert float((one - many).norm() / one.norm()) <= 1e-4


def test_only_what_is_asked_for():
    """A first trained layer asks for no dx; a frozen factor gets no gradient."""
    base, tensors, _ = make_base("nf4", 8, 32, torch.float32)
    a, b = factors(4, 8, 32)
    x = torch.randn(3, 32)
    lora_linear(x, a, b, 1.0, base, *tensors).sum().backward()
    assert a.grad is not None and b.grad is not None and x.grad is None
    frozen = a.detach()
    y = lora_linear(x, frozen, b, 1.0, base, *tensors)
    assert y.requires_grad and torch.autograd.grad(y.sum(), b)[0].shape == b.shape


def test_weights_get_no_gradient_and_keep_their_bits():
    base, tensors, _ = make_base("nf4-nested", 8, 64, torch.bfloat16)
    before = [None if t is None else t.clone() for t in tensors]
    a, b = factors(4, 8, 64)
    lora_linear(torch.randn(40, 64).bfloat16(), a, b, 1.0, base, *tensors).sum().backward()
    for old, new in zip(before, tensors, strict=True):
        assert old is None or (torch.equal(old, new) and new.grad is None)


def test_refuses_what_does_not_fit():
    base, tensors, _ = make_base("dense", 8, 32, torch.float32)
    a, b = factors(4, 8, 32)
    with pytest.raises(ValueError, match=r"A, B: wanted \[r, 31\] and \[out, r\]"):
        lora_linear(torch.randn(2, 31), a, b, 1.0, base, *tensors)
    with pytest.raises(ValueError, match="match the factors"):
        lora_linear(torch.randn(2, 32), a, b[:, 1:], 1.0, base, *tensors)
    with pytest.raises(TypeError, match="A, B: wanted torch.float32, got torch.bfloat16"):
        lora_linear(torch.randn(2, 32), a.bfloat16(), b, 1.0, base, *tensors)
    with pytest.raises(TypeError, match="x: wanted a float32, bfloat16 or float16 tensor"):
        lora_linear(torch.ones(2, 32, dtype=torch.int64), a, b, 1.0, base, *tensors)


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
def test_autocast(kind):
    """As a linear layer there: computed in bf16, gradients of fp32 parameters in fp32."""
    base, tensors, weight = make_base(kind, 8, 64, torch.float32)
    a, b = factors(4, 8, 64)
    x = torch.randn(40, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, a, b, 1.0, base, *tensors)
        gated = swiglu_lora_linear(x, x, "silu", a, b, 1.0, base, *tensors)
    assert y.dtype == gated.dtype == torch.bfloat16
    dx, da, db = torch.autograd.grad(y.float().sum(), (x, a, b))
    assert dx.dtype == da.dtype == db.dtype == torch.float32
    exact = plain(x, a, b, 1.0, weight.float(), tensors[-1])
    assert float((y.float() - exact).norm() / exact.norm()) < 6e-3
