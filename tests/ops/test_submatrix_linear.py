"""Submatrix ops and their autograd against float64, on every path."""

import pytest
import torch
from _compare import DTYPES, assert_as_good, assert_bits, grads, padded_rows, sorted_choice, strided, wide
from torch.nn import functional

from inlay import ops
from inlay.ops import DenseBase, DenseBaseT, submatrix

# rows, width, chosen: odd sizes, a single channel, all channels, no row
SIZES = [(1, 1, 1), (5, 7, 3), (17, 113, 113), (33, 203, 40), (3, 64, 16), (0, 9, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, chosen", SIZES)
def test_raw_ops(path, dtype, rows, width, chosen):
    x, indices = torch.randn(rows, width).to(dtype), sorted_choice(width, chosen)
    acc, acc_sel = torch.randn(rows, width), torch.randn(rows, chosen)
    for view in (x, strided(x), padded_rows(x)):
        assert_bits(submatrix.submatrix_gather(view, indices, torch.float32), x[:, indices].float(), "gather, upcast")
        assert_bits(submatrix.submatrix_gather(view, indices, dtype), x[:, indices], "gather")
        assert_bits(submatrix.submatrix_add(view, acc), (x.float() + acc).to(dtype), "add")
        assert_bits(submatrix.submatrix_add(view, strided(acc)), (x.float() + acc).to(dtype), "add, strided sum")
    wanted = x.clone()
    wanted[:, indices] = (x[:, indices].float() + acc_sel).to(dtype)
    for target in (x.clone(), strided(x), padded_rows(x)):
        submatrix.submatrix_scatter_add_(target, indices, acc_sel)
        assert_bits(target, wanted, "scatter_add_")
    for target in (x.clone(), strided(x), padded_rows(x)):
        submatrix.submatrix_add_(target, acc)
        assert_bits(target, (x.float() + acc).to(dtype), "add_")


def test_writes_nothing_else(path):
    """Poisoned neighbours stay poisoned: rows lie inside a larger buffer."""
    big = torch.full((6, 50), 777.0, dtype=torch.bfloat16)
    inner = big[1:4, 3:40]
    inner.zero_()
    submatrix.submatrix_add_(inner, torch.ones(3, 37))
    assert float(inner.min()) == float(inner.max()) == 1
    assert int((big == 777).sum()) == big.numel() - inner.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_write(path, dtype, dim, transposed):
    weight = torch.randn(19, 37).to(dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    before, version = weight.clone(), weight._version
    indices = sorted_choice(weight.shape[dim], 8)
    shape = (19, 8) if dim == 1 else (8, 37)
    values = torch.randn(shape) * 3
    submatrix.submatrix_write_(weight, indices, values, dim)
    before.index_copy_(dim, indices, values.to(dtype))
    assert_bits(weight, before, "write_")
    assert weight._version == version


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad(path, dtype):
    dy, x = torch.randn(3, 11, 29).to(dtype), torch.randn(3, 11, 13).to(dtype)
    ours = submatrix.submatrix_grad(dy, x)
    exact = dy.double().view(-1, 29).t() @ x.double().view(-1, 13)
    plain = dy.float().view(-1, 29).t() @ x.float().view(-1, 13)
    assert ours.dtype == torch.float32
    assert_as_good(ours, plain, exact, "submatrix_grad")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns, chosen", [(29, 13), (13, 29), (4133, 5)])
def test_grad_into_a_sum(path, dtype, columns, chosen):
    """Written, and added to what is there: in panels too."""
    dy, x, before = torch.randn(70, columns).to(dtype), torch.randn(70, chosen).to(dtype), torch.randn(columns, chosen)
    product = submatrix.submatrix_grad(dy, x)
    exact = dy.double().t() @ x.double()
    for add in (False, True):
        out = before.clone()
        submatrix.submatrix_grad_into_(out, dy, x, add)
        assert_as_good(out, before * add + product, before.double() * add + exact, f"add {add}", slack=2)
    with pytest.raises(ValueError, match="out: wanted shape"):
        submatrix.submatrix_grad_into_(before[1:], dy, x, True)
    with pytest.raises(TypeError, match="out: wanted torch.float32"):
        submatrix.submatrix_grad_into_(before.bfloat16(), dy, x, True)


def _dense_delta(values, indices, side, out, width):
    delta = torch.zeros(out, width, dtype=values.dtype)
    return delta.index_copy(1 if side == "in" else 0, indices, values)


def _case(side, dtype, out=19, width=23, chosen=7):
    x = torch.randn(2, 5, width).to(dtype).requires_grad_()
    weight, bias = (torch.randn(out, width) / 4).to(dtype), torch.randn(out).to(dtype)
    shape = (out, chosen) if side == "in" else (chosen, width)
    values = (torch.randn(shape) / 4).requires_grad_()
    indices = sorted_choice(width if side == "in" else out, chosen)
    return x, values, indices, weight, bias, torch.randn(2, 5, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["in", "out"])
def test_additive(path, dtype, side):
    x, values, indices, weight, bias, cotangent = _case(side, dtype)
    x64, v64, w64, b64 = (t.requires_grad_() for t in wide(x, values, weight, bias))
    exact = functional.linear(x64, w64 + _dense_delta(v64, indices, side, *weight.shape), b64)
    exact_grads = grads(exact, [x64, v64], [cotangent])
    xt, vt = x.detach().clone().requires_grad_(), values.detach().clone().requires_grad_()
    delta = _dense_delta(vt, indices, side, *weight.shape).to(dtype)
    eager = functional.linear(xt, weight, bias) + functional.linear(xt, delta)
    eager_grads = grads(eager, [xt, vt], [cotangent])
    ours = {
        "linear": ops.submatrix_linear(x, values, indices, side, DenseBase, weight, bias),
        "linear, Conv1D": ops.submatrix_linear(x, values, indices, side, DenseBaseT, weight.t().contiguous(), bias),
        "add_delta": ops.submatrix_add_delta(functional.linear(x, weight, bias), x, values, indices, side),
    }
    for name, y in ours.items():
        assert y.dtype == dtype
        assert_as_good(y, eager, exact, name)
        for what, got, plain, wanted in zip(
            ("dx", "dv"), grads(y, [x, values], [cotangent]), eager_grads, exact_grads, strict=True
        ):
            assert_as_good(got, plain, wanted, f"{name} {what}", slack=4)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("base", [DenseBase, DenseBaseT])
def test_in_place_equals_full_finetuning(path, side, base):
    x, values, indices, weight, bias, cotangent = _case(side, torch.float32)
    stored = weight.clone() if base is DenseBase else weight.t().contiguous()
    y = ops.submatrix_linear_in_place(x, values, indices, side, base, stored, bias)
    full = weight.index_copy(1 if side == "in" else 0, indices, values.detach()).requires_grad_()
    xt = x.detach().clone().requires_grad_()
    wanted = functional.linear(xt, full, bias)
    dx, dw = grads(wanted, [xt, full], [cotangent])
    got_dx, got_dv = grads(y, [x, values], [cotangent])
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(got_dx, dx)
    torch.testing.assert_close(got_dv, dw.index_select(1 if side == "in" else 0, indices))
    assert_bits(base.out_in(stored), full.detach(), "weight")


def test_saves_only_what_the_gradient_needs():
    x, values, indices, weight, bias, _ = _case("in", torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.submatrix_linear(x.detach(), values, indices, "in", DenseBase, weight, bias)
    assert {tuple(t.shape) for t in saved} == {(2, 5, 7), (7,)}  # x[..., I] and I; no weight, no x


def test_double_precision_gradients():
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight, indices = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 2, 4])
    for side, shape in (("in", (5, 3)), ("out", (3, 6))):
        values = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, v, side=side: ops.submatrix_linear(x, v, indices, side, DenseBase, weight), (x, values)
        )


@pytest.mark.parametrize("side", ["in", "out"])
def test_autocast(path, side):
    x, values, indices, weight, bias, _ = _case(side, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.submatrix_linear(x, values, indices, side, DenseBase, weight, bias)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == values.grad.dtype == torch.float32


def test_bad_input(path):
    x, values, indices, weight, bias, _ = _case("in", torch.bfloat16)
    linear = ops.submatrix_linear
    with pytest.raises(IndexError):
        linear(x, values, indices + 20, "in", DenseBase, weight)
    with pytest.raises(TypeError, match="keep trainable values in fp32"):
        linear(x, values.bfloat16(), indices, "in", DenseBase, weight)
    with pytest.raises(TypeError, match="indices: wanted int64"):
        linear(x, values, indices.int(), "in", DenseBase, weight)
    with pytest.raises(ValueError, match="side: wanted 'in' or 'out'"):
        linear(x, values, indices, "column", DenseBase, weight)
    with pytest.raises(ValueError, match="values"):
        linear(x, values[:, 1:], indices, "in", DenseBase, weight)
    with pytest.raises(ValueError, match="acc: wanted shape"):
        submatrix.submatrix_add(x, torch.zeros(2, 5, 3))
