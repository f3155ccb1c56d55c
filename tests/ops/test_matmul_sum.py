"""Sums of products in one contraction, in bf16 and in 8 bits."""

import pytest
import torch
from _compare import assert_as_good, assert_bits, padded_rows, wide

from inlay import _native
from inlay.ops import force_path
from inlay.ops.int8_products import Int8Products, Int8ProductsT, int8_matmul_sum, int8_matmul_sum_, turned
from inlay.ops.matmul_sum import ISA, ISAS, matmul_sum, matmul_sum_, mm, mm_into, packs, packs_bytes
from inlay.ops.submatrix import submatrix_grad, submatrix_grad_into_

# Edges of strips (14 rows), panels (32 columns), pairs and stretches of the contraction (2,048), and several operands.
SHAPES = [
    (1, (1,), 1),
    (13, (7,), 31),
    (15, (2,), 33),
    (29, (64, 3), 48),
    (64, (33, 17, 5), 100),
    (31, (900, 901), 17),
    (17, (2047, 6), 40),
    (5, (4500,), 65),
]
LAYOUTS = ["along", "across", "mixed"]


def operands(rows, depths, columns, layout="along", dtype=torch.bfloat16):
    """lefts [M, K_i] and rights [K_i, N], whose neighbours in memory are those of the contraction, or not."""
    lefts, rights = [], []
    for i, depth in enumerate(depths):
        along = layout == "along" or (layout == "mixed" and i % 2 == 0)
        left, right = torch.randn(rows, depth), torch.randn(depth, columns)
        lefts.append((left if along else left.t().contiguous().t()).bfloat16())
        rights.append((right.t().contiguous().t() if along else right).to(dtype))
    return lefts, rights


def total(lefts, rights):
    return sum(left @ right for left, right in zip(lefts, rights, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows, depths, columns", SHAPES)
def test_against_float64(path, rows, depths, columns, layout):
    lefts, rights = operands(rows, depths, columns, layout)
    bias, before = torch.randn(columns).bfloat16(), torch.randn(rows, columns).bfloat16()
    exact = total(wide(*lefts), wide(*rights))
    plain = total([t.float() for t in lefts], [t.float() for t in rights])
    assert_as_good(matmul_sum(lefts, rights), plain.bfloat16(), exact, "sum", slack=2)
    assert_as_good(matmul_sum(lefts, rights, dtype=torch.float32), plain, exact, "fp32", slack=2 + sum(depths) / 16)
    out = before.clone()
    matmul_sum_(out, lefts, rights, bias, True)
    exact = exact + bias.double() + before.double()
    assert_as_good(out, (plain + bias + before).bfloat16(), exact, "onto", slack=2)


def test_fp32_operands_keep_sixteen_bits(path):
    lefts, rights = operands(40, (33, 20), 50, "mixed", torch.float32)
    exact = total(wide(*lefts), wide(*rights))
    error = (matmul_sum(lefts, rights, dtype=torch.float32).double() - exact).norm() / exact.norm()
    assert error < 2.0**-16
    assert (total(lefts, [t.bfloat16() for t in rights]).double() - exact).norm() / exact.norm() > 2.0**-10


@pytest.mark.parametrize("layout", ["along", "across"])
@pytest.mark.parametrize("rows, depths, columns", SHAPES)
def test_operands_that_are_all_fp32(path, rows, depths, columns, layout):
    lefts, rights = (
        [t.float() + torch.randn(t.shape) * 1e-3 for t in each] for each in operands(rows, depths, columns)
    )
    if layout == "along":
        rights = [t.t().contiguous().t() for t in rights]
    else:
        lefts = [t.t().contiguous().t() for t in lefts]
    out, bias = torch.randn(rows, columns), torch.randn(columns)
    exact = total(wide(*lefts), wide(*rights)) + bias.double() + out.double()
    torchs = sum(left @ right for left, right in zip(lefts, rights)) + bias + out
    matmul_sum_(out, lefts, rights, bias, True)
    assert_as_good(out, torchs, exact, "fp32", slack=4 + sum(depths) / 16)


def test_transposed_outputs_and_rows_of_wider_matrices(path):
    lefts, rights = operands(37, (19,), 45)
    wanted = matmul_sum(lefts, rights)
    turned = torch.empty(45, 37, dtype=torch.bfloat16).t()
    matmul_sum_(turned, lefts, rights, None, False)
    assert_bits(turned, wanted)
    inner = padded_rows(torch.zeros(37, 45, dtype=torch.bfloat16))
    matmul_sum_(inner, [padded_rows(lefts[0])], [padded_rows(rights[0].t().contiguous()).t()], None, False)
    assert_bits(inner, wanted)
    strange = torch.randn(19, 90).bfloat16()[:, ::2]
    assert_bits(matmul_sum(lefts, [strange]), matmul_sum(lefts, [strange.contiguous()]))


@pytest.mark.parametrize("op", [matmul_sum_, int8_matmul_sum_])
def test_bits_do_not_depend_on_threads(op):
    lefts, rights = operands(75, (300, 90), 130, "along")
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(torch.empty(75, 130, dtype=torch.bfloat16))
        op(results[-1], lefts, rights, None, False)
    torch.set_num_threads(before)
    for result in results[1:]:
        assert_bits(result, results[0])


def test_torch_s_products_where_operands_are_others(path):
    left, right = torch.randn(40, 8), torch.randn(8, 40)
    assert_bits(mm(left, right), left.mm(right))
    out = torch.empty(40, 40)
    mm_into(out, left, right)
    assert_bits(out, left.mm(right))


def test_errors_name_both_shapes():
    out, left, right = torch.empty(3, 4), torch.randn(3, 5).bfloat16(), torch.randn(6, 4).bfloat16()
    for op in (matmul_sum_, int8_matmul_sum_):
        with pytest.raises(ValueError, match=r"pairs of \[3, K\] and \[K, 4\].*\(3, 5\), \(6, 4\)"):
            op(out, [left], [right], None, False)
        with pytest.raises(ValueError, match="1 and 0"):
            op(out, [left], [], None, False)


@pytest.mark.parametrize("op", [matmul_sum_, int8_matmul_sum_])
def test_opcheck(op):
    lefts, rights = operands(17, (6, 4), 9)
    torch.library.opcheck(op.overload, (torch.randn(17, 9).bfloat16(), lefts, rights, torch.randn(9).bfloat16(), True))


def test_packs_wants_many_rows_of_bf16_and_the_engine():
    many = torch.randn(64, 8).bfloat16()
    here = _native.available() and _native.module().isa() in ISAS
    assert packs(many) == here
    assert not packs(many[:3]) and not packs(many.float()) and not packs(many[:, :0])
    with force_path("reference"):
        assert not packs(many)


def test_eight_bits_want_twice_as_many_rows():
    here = _native.available() and _native.module().isa() == ISA
    assert packs_bytes(torch.randn(64, 8).bfloat16()) == here
    assert not packs_bytes(torch.randn(63, 8).bfloat16())


# --- 8 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["along", "across"])
@pytest.mark.parametrize("rows, depths, columns", SHAPES)
def test_eight_bits_as_the_reference_rounds(path, rows, depths, columns, layout):
    lefts, rights = operands(rows, depths, columns, layout)
    lefts = [t.contiguous() for t in lefts]
    lefts[0][0], rights[0][:, 0] = 0, 0  # a scale of nothing
    ours, wanted = torch.ones(rows, columns), torch.ones(rows, columns)
    int8_matmul_sum_(ours, lefts, rights, torch.ones(columns), True)
    int8_matmul_sum_.reference(wanted, lefts, rights, torch.ones(columns), True)
    assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-4)
    exact = total(wide(*lefts), wide(*rights)) + 2
    if sum(depths) > 16:
        assert float((ours.double() - exact).norm() / exact.norm()) < 0.015


@pytest.mark.parametrize("size", [1e-40, 1e-37, 1e-35, 1e30])
def test_eight_bits_of_any_magnitude(path, size):
    lefts, rights = operands(20, (40,), 33)
    ours, wanted = torch.empty(20, 33), torch.empty(20, 33)
    lefts[0] *= size
    int8_matmul_sum_(ours, lefts, rights, None, False)
    int8_matmul_sum_.reference(wanted, lefts, rights, None, False)
    assert torch.isfinite(ours).all() and torch.allclose(ours, wanted, rtol=1e-5, atol=1e-36)
    lefts[0][3, 5] = float("nan")
    int8_matmul_sum_(ours, lefts, rights, None, False)
    assert ours[3].isnan().all() and torch.isfinite(ours[:3]).all() and torch.isfinite(ours[4:]).all()


@pytest.mark.parametrize("layout", ["along", "across"])
@pytest.mark.parametrize("depth", [64, 70, 576])
def test_eight_bits_keep_what_stands_beside_an_outlier(path, depth, layout):
    """A row with one number a hundred times the others keeps their products: alone, it would take all 8 bits."""
    (left,), (right,) = operands(64, (depth,), 40, layout)
    left[:, 3], right[3] = 100 * left[:, 3].sign(), 0  # the outlier itself adds nothing
    exact = left.double() @ right.double()
    ours = int8_matmul_sum([left], [right])
    assert float((ours.double() - exact).norm() / exact.norm()) < 0.12  # 0.22 and more without the turn


@pytest.mark.parametrize("depth", [1, 64, 100, 192])
def test_turning_keeps_products(depth):
    x, w = torch.randn(5, depth, dtype=torch.float64), torch.randn(7, depth, dtype=torch.float64)
    assert torch.allclose(turned(x) @ turned(w).t(), (x @ w.t()).float(), rtol=1e-4, atol=1e-4)
    eye = turned(torch.eye(64))
    assert torch.equal(eye @ eye.t(), torch.eye(64)) and torch.equal(eye.abs(), torch.full((64, 64), 0.125))


@pytest.mark.parametrize("columns", [(48, 3), (3, 48), (200, 180)])
def test_weight_gradients_come_straight_from_bf16(path, columns, monkeypatch):
    dy, x = (torch.randn(70, width).bfloat16() for width in columns)
    exact = dy.double().t() @ x.double()
    if path == ISA:
        monkeypatch.setattr("inlay.ops.submatrix._grad_reference", None)  # which makes fp32 copies
    assert_as_good(submatrix_grad(dy, x), dy.float().t() @ x.float(), exact, "dW", slack=4)
    total = torch.ones(columns)
    submatrix_grad_into_(total, dy, x, True)
    assert_as_good(total, 1 + dy.float().t() @ x.float(), 1 + exact, "dW onto", slack=4)


@pytest.mark.parametrize("base, turned", [(Int8Products, False), (Int8ProductsT, True)])
def test_a_base_in_eight_bits(path, base, turned):
    x, weight, bias = torch.randn(2, 32, 48).bfloat16(), torch.randn(40, 48).bfloat16(), torch.randn(40).bfloat16()
    held = weight.t().contiguous() if turned else weight
    left, right = torch.randn(64, 4).bfloat16(), torch.randn(40, 4).bfloat16()

    def near(ours, exact):
        assert ours.shape == exact.shape
        assert float((ours.double() - exact).norm() / exact.norm()) < 0.02

    low = (left.double() @ right.double().t()).view(2, 32, 40)
    near(base.forward(x, held, bias), x.double() @ weight.double().t() + bias.double())
    near(base.forward_plus(x, left, right, held, None), x.double() @ weight.double().t() + low)
    dy, back = torch.randn(2, 32, 40).bfloat16(), torch.randn(4, 48).bfloat16()
    near(base.backward_input(dy, held), dy.double() @ weight.double())
    summed = dy.double() @ weight.double() + (left.double() @ back.double()).view(2, 32, 48)
    near(base.backward_input_plus(dy, left, back, held), summed)
    near(base.add_up(base.terms(dy, held) * 2, [(left, back)]), summed + dy.double() @ weight.double())
