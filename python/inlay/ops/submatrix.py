"""Raw ops of the submatrix delta: gather channels, add with one rounding, scatter-add, write, gradient.

`indices` are always int64 [s], sorted and unique. The products themselves are torch.mm (CONTRIBUTING:
large products belong to oneDNN and cuBLAS); what is ours is what a GEMM library cannot do: gathers that
upcast on the way, and sums that are rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from inlay._native import module
from inlay.ops._registry import (
    as_rows,
    check_device,
    check_floating,
    check_indices,
    compute_dtype,
    fail,
    raw_op,
    unit_inner,
    writable_rows,
)
from inlay.ops.matmul_sum import matmul_sum_, packs


def _check_acc(op: str, acc: Tensor, like: Tensor, width: int) -> None:
    if acc.dtype != compute_dtype(like):
        fail(op, "acc", str(compute_dtype(like)), acc.dtype, "keep sums in fp32 until the one rounding", TypeError)
    check_device(op, "acc", acc, "the activations", like)
    wanted = (*like.shape[:-1], width)
    if acc.shape != wanted:
        fail(op, "acc", f"shape {tuple(wanted)}", tuple(acc.shape), "pass one sum per entry")


# --- gather: out[..., j] = x[..., indices[j]] ------------------------------------------------------------


def _gather_native(x: Tensor, indices: Tensor, out_dtype: torch.dtype) -> Tensor:
    check_indices("submatrix_gather", indices, x)
    check_floating("submatrix_gather", "x", x)
    out = x.new_empty((*x.shape[:-1], indices.numel()), dtype=out_dtype)
    module().submatrix_gather(as_rows(out), as_rows(x), indices.contiguous())
    return out


def _gather_fake(x: Tensor, indices: Tensor, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], indices.shape[0]), dtype=out_dtype)


@raw_op(native=_gather_native, fake=_gather_fake)
def submatrix_gather(x: Tensor, indices: Tensor, out_dtype: torch.dtype) -> Tensor:
    """x [..., K], indices [s] -> [..., s] in `out_dtype`."""
    check_indices("submatrix_gather", indices, x)
    check_floating("submatrix_gather", "x", x)
    return x.index_select(-1, indices).to(out_dtype)


# --- add: out = round(float(y) + acc), one rounding ------------------------------------------------------


def _add_native(y: Tensor, acc: Tensor) -> Tensor:
    check_floating("submatrix_add", "y", y)
    _check_acc("submatrix_add", acc, y, y.shape[-1])
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    module().submatrix_add(as_rows(out), as_rows(y), as_rows(acc))
    return out


@raw_op(native=_add_native, fake=lambda y, acc: y.new_empty(y.shape))
def submatrix_add(y: Tensor, acc: Tensor) -> Tensor:
    """y [..., N], acc fp32 [..., N] -> [..., N] in y's dtype."""
    check_floating("submatrix_add", "y", y)
    _check_acc("submatrix_add", acc, y, y.shape[-1])
    return torch.add(acc, y).to(y.dtype).contiguous()


def _add_in_place_native(y: Tensor, acc: Tensor) -> None:
    check_floating("submatrix_add_", "y", y)
    _check_acc("submatrix_add_", acc, y, y.shape[-1])
    with writable_rows(y) as rows:
        module().submatrix_add(rows, rows, as_rows(acc))


@raw_op(native=_add_in_place_native, fake=lambda y, acc: None, mutates=("y",))
def submatrix_add_(y: Tensor, acc: Tensor) -> None:
    """submatrix_add into y's own memory: for a y that nobody else has seen yet."""
    check_floating("submatrix_add_", "y", y)
    _check_acc("submatrix_add_", acc, y, y.shape[-1])
    y.detach().copy_(torch.add(acc, y))


# --- scatter-add: dx[..., indices] = round(float(dx[..., indices]) + acc) ---------------------------------


def _scatter_add_native(dx: Tensor, indices: Tensor, acc: Tensor) -> None:
    check_indices("submatrix_scatter_add_", indices, dx)
    check_floating("submatrix_scatter_add_", "dx", dx)
    _check_acc("submatrix_scatter_add_", acc, dx, indices.numel())
    with writable_rows(dx) as rows:
        module().submatrix_scatter_add(rows, indices.contiguous(), as_rows(acc))


@raw_op(native=_scatter_add_native, fake=lambda dx, indices, acc: None, mutates=("dx",))
def submatrix_scatter_add_(dx: Tensor, indices: Tensor, acc: Tensor) -> None:
    """dx [..., K] in place, indices [s], acc fp32 [..., s]; the other channels keep their bits."""
    check_indices("submatrix_scatter_add_", indices, dx)
    check_floating("submatrix_scatter_add_", "dx", dx)
    _check_acc("submatrix_scatter_add_", acc, dx, indices.numel())
    summed = dx.index_select(-1, indices).to(acc.dtype) + acc
    dx.detach().index_copy_(-1, indices, summed.to(dx.dtype))


# --- write: weight[:, indices] = values (dim 1) or weight[indices, :] = values (dim 0) --------------------


def _check_write(weight: Tensor, indices: Tensor, values: Tensor, dim: int) -> None:
    op = "submatrix_write_"
    check_indices(op, indices, weight)
    check_floating(op, "weight", weight)
    check_device(op, "values", values, "weight", weight)
    if weight.dim() != 2 or dim not in (0, 1):
        fail(op, "weight, dim", "a 2-D weight and dim 0 or 1", (weight.dim(), dim), "pass the weight as stored")
    wanted = (weight.shape[0], indices.shape[0]) if dim == 1 else (indices.shape[0], weight.shape[1])
    if values.shape != wanted:
        fail(op, "values", f"shape {wanted}", tuple(values.shape), "pass one value per chosen weight")
    if values.dtype != compute_dtype(weight):
        fail(op, "values", str(compute_dtype(weight)), values.dtype, "trainable values are kept in fp32", TypeError)


def _write_native(weight: Tensor, indices: Tensor, values: Tensor, dim: int) -> None:
    _check_write(weight, indices, values, dim)
    # Rows of the transposed views are columns, so one kernel serves both dims.
    target, source = (weight, values) if dim == 1 else (weight.t(), values.t())
    module().submatrix_write(target.detach(), indices.contiguous(), source.detach())


@raw_op(native=_write_native, fake=lambda weight, indices, values, dim: None, mutates=("weight",))
def submatrix_write_(weight: Tensor, indices: Tensor, values: Tensor, dim: int) -> None:
    """Cast `values` into the chosen columns (dim 1) or rows (dim 0) of `weight`.

    The version counter stays as it is: backward reads nothing of the old values, and a bump would make
    autograd refuse weights that other calls of this step have saved.
    """
    _check_write(weight, indices, values, dim)
    weight.data.index_copy_(dim, indices, values.detach().to(weight.dtype))


# --- gradient: dyᵀ · x_sel, fp32 ------------------------------------------------------------------------


def _check_grad(dy: Tensor, x_sel: Tensor) -> None:
    check_floating("submatrix_grad", "dy", dy)
    check_floating("submatrix_grad", "x_sel", x_sel)
    check_device("submatrix_grad", "x_sel", x_sel, "dy", dy)
    if dy.shape[:-1] != x_sel.shape[:-1]:
        wanted = f"leading shape {tuple(dy.shape[:-1])} as dy"
        fail("submatrix_grad", "x_sel", wanted, tuple(x_sel.shape), "pass the activations of the same tokens")


def _grad_fake(dy: Tensor, x_sel: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[-1], x_sel.shape[-1]), dtype=torch.promote_types(dy.dtype, torch.float32))


def _grad_reference(dy: Tensor, x_sel: Tensor) -> Tensor:
    """dy [..., N], x_sel [..., s] -> fp32 [N, s], summed over all tokens in fp32. Swap roles for output channels."""
    _check_grad(dy, x_sel)
    wide = compute_dtype(dy)
    left, right = as_rows(dy).to(wide), as_rows(x_sel).to(wide)
    if right.shape[1] >= left.shape[1]:
        return left.t().mm(right)
    # The short side first: 1,024 x 576 with 18 channels takes 0.16 ms instead of 0.28 (fp32 GEMM, one core).
    return right.t().mm(left).t().contiguous()


#: Columns of the narrow operand up to which cuda/submatrix_grad.cu can be used. It reads the wide one once, from as
#: many blocks as the GPU holds. On an H200 cuBLAS takes 0.62 to 0.74 of its time at 16 and 64 columns, so it is left to
#: operands whose rows, of no multiple of 8 numbers, cuBLAS cannot load 16 bytes at a time (at 430 columns it runs at a
#: tenth of the bandwidth).
CUDA_NARROW, CUBLAS_ALIGNED = 64, 8


def narrow_grad(wide: Tensor, narrow: Tensor, processors: int, transposed: bool = False) -> Tensor:
    """wideᵀ·narrow, fp32 [N, s] (transposed: [s, N]), by the CUDA kernel: sums over shares of the tokens, then theirs.

    Two blocks of 64 columns for every multiprocessor keep memory busy; a share is worth its sums from 256 tokens on.
    """
    columns = wide.shape[1], narrow.shape[1]
    blocks = max(1, -(-columns[0] // 64))
    shares = max(1, min(-(-2 * processors // blocks), wide.shape[0] // 256))
    shape = (shares, *(reversed(columns) if transposed else columns))
    sums = torch.empty(shape, dtype=torch.float32, device=wide.device)
    out = sums.transpose(1, 2) if transposed else sums
    module().submatrix_grad(out, unit_inner(wide), unit_inner(narrow), False)
    return sums[0] if shares == 1 else sums.sum(0)


def _grad_on_cuda(left: Tensor, right: Tensor) -> Tensor:
    transposed = left.shape[1] < right.shape[1]
    wide, narrow = (right, left) if transposed else (left, right)
    if narrow.shape[1] > CUDA_NARROW or narrow.shape[1] % CUBLAS_ALIGNED == 0:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return narrow_grad(wide, narrow, processors_of(left.device), transposed)


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _grad_native(dy: Tensor, x_sel: Tensor) -> Tensor:
    """Straight from 16 bits where there is a kernel for that, elsewhere torch's fp32 product of fp32 copies."""
    _check_grad(dy, x_sel)
    left, right = as_rows(dy), as_rows(x_sel)
    if left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16):
        return _grad_on_cuda(left, right)
    write = _from_sixteen_bits(left, right)
    if write is None:
        return _grad_reference(dy, x_sel)
    out = torch.empty(left.shape[1], right.shape[1], dtype=torch.float32)
    write(out, left, right, False)
    return out


def _from_sixteen_bits(left: Tensor, right: Tensor) -> Callable[[Tensor, Tensor, Tensor, bool], None] | None:
    """What writes leftᵀ·right into fp32, or adds it, without fp32 copies of either; None where nothing here does."""
    if not (left.is_cpu and left.dtype == right.dtype == torch.bfloat16 and left.numel() and right.numel()):
        return None
    if packs(left):
        return _grad_packed
    return _grad_on_amx if module().isa() == "amx" else None


#: Columns of the narrow operand up to which its rows are the strips of the product.
_NARROW = 128


def _grad_packed(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    if right.shape[1] <= min(_NARROW, left.shape[1]):
        matmul_sum_(out.t(), [right.t()], [left], None, add)
    else:
        matmul_sum_(out, [left.t()], [right], None, add)


def _grad_on_amx(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    if right.shape[1] <= left.shape[1]:
        module().submatrix_grad(out, unit_inner(left), unit_inner(right), add)
    else:
        module().submatrix_grad(out.t(), unit_inner(right), unit_inner(left), add)


_grad_reference.__name__ = "submatrix_grad"
submatrix_grad = raw_op(native=_grad_native, fake=_grad_fake)(_grad_reference)


# --- the same into a sum that is as large as a weight -----------------------------------------------------------------

#: Rows of the sum whose product is formed at a time where no kernel adds: what lies beside the sum stays small.
_PANEL = 4096


def _check_into(out: Tensor, dy: Tensor, x_sel: Tensor) -> None:
    _check_grad(dy, x_sel)
    op, wanted = "submatrix_grad_into_", (dy.shape[-1], x_sel.shape[-1])
    check_device(op, "out", out, "dy", dy)
    if out.dtype != compute_dtype(dy):
        fail(op, "out", str(compute_dtype(dy)), out.dtype, "keep sums in fp32 until the one rounding", TypeError)
    if out.shape != wanted:
        fail(op, "out", f"shape {wanted}", tuple(out.shape), "pass the whole sum")


def _into_native(out: Tensor, dy: Tensor, x_sel: Tensor, add: bool) -> None:
    """In a kernel where there is one; elsewhere a panel after the other by submatrix_grad."""
    _check_into(out, dy, x_sel)
    left, right = as_rows(dy), as_rows(x_sel)
    write = _from_sixteen_bits(left, right)
    if write is not None:
        return write(out.detach(), left, right, add)
    for start in range(0, out.shape[0], _PANEL):
        panel, product = out.detach()[start : start + _PANEL], submatrix_grad(left[:, start : start + _PANEL], right)
        _ = panel.add_(product) if add else panel.copy_(product)


@raw_op(native=_into_native, fake=lambda out, dy, x_sel, add: None, mutates=("out",))
def submatrix_grad_into_(out: Tensor, dy: Tensor, x_sel: Tensor, add: bool) -> None:
    """out fp32 [N, s] = dyᵀ·x_sel, or that added to it; no copy of out's size is made."""
    _check_into(out, dy, x_sel)
    product = _grad_reference(dy, x_sel)
    out.detach().copy_(out.detach() + product if add else product)
