"""Where things lie in memory: any alignment, and beyond 32 bits (test_kernels_blocks.py says in which places)."""

from __future__ import annotations

import pytest
import torch
from _compare import assert_bits
from _kernels import outputs, packed_weight, randn

from inlay import _native
from inlay.ops._registry import RAW_OPS
from inlay.ops.quantize_blockwise import dequantize_4bit_
from inlay.ops.submatrix import narrow_grad


@pytest.mark.parametrize("shift", range(1, 8))
def test_rows_that_start_anywhere(place, shift):
    """16-byte loads must not be used for them; UBSan looks on."""
    x = randn(6, 264, dtype=torch.bfloat16)
    whole = x[:, shift : shift + 256].to(place)
    view = x.to(place)[:, shift : shift + 256]
    assert view.data_ptr() % 16 != 0
    for name, args, close in (
        ("swiglu_forward", lambda t: (t, t, "silu"), False),
        ("submatrix_add", lambda t: (t, torch.ones(6, 256, device=t.device)), False),
        ("scale_shift_forward", lambda t: (t, torch.ones(256, device=t.device), None, None), False),
        ("cross_entropy_chunk_", lambda t: (t, torch.arange(6, device=t.device), 1.0, False), True),
        ("rms_norm_forward", lambda t: (t, None, 1e-5, 0.0), True),
    ):
        got, wanted = outputs(RAW_OPS[name], args(view), ()), outputs(RAW_OPS[name], args(whole.contiguous()), ())
        if close:  # lanes add other elements then
            torch.testing.assert_close(got, wanted)
        else:
            assert_bits(got[0].cpu(), wanted[0].cpu(), name)


FAR = (1 << 31) + 64


def far_apart(path, values):
    """The same rows, each beginning 2^31 elements behind the other, in a file of which only these pages exist."""
    size = (values.shape[0] - 1) * FAR + values.shape[1]
    memory = torch.from_file(str(path), shared=True, size=size, dtype=values.dtype)
    view = memory.as_strided(values.shape, (FAR, 1))
    view.copy_(values)
    return view


def test_rows_beyond_32_bits(place, tmp_path):
    """An index of 32 bits would land in a hole of zeros, or outside."""
    if place.type != "cpu":
        pytest.skip("tests/gpu has its own")
    x, indices = randn(3, 40, dtype=torch.bfloat16), torch.tensor([0, 7, 39])
    far = far_apart(tmp_path / "x", x)
    for name, args in (
        ("swiglu_forward", lambda t: (t, t, "silu")),
        ("scale_shift_forward", lambda t: (t, torch.arange(40.0), None, None)),
        ("submatrix_gather", lambda t: (t, indices, torch.float32)),
        ("cross_entropy_chunk_", lambda t: (t, torch.tensor([1, 2, 3]), 1.0, False)),
    ):
        assert_bits(RAW_OPS[name](*args(far)), RAW_OPS[name](*args(x.clone())), name)
    got, wanted = (RAW_OPS["rms_norm_forward"](t, None, 1e-5, 0.0)[0] for t in (far, x))
    assert_bits(got, wanted, "rms_norm_forward")
    acc = randn(3, 3)
    RAW_OPS["submatrix_scatter_add_"](far, indices, acc)
    RAW_OPS["submatrix_scatter_add_"](x, indices, acc)
    assert_bits(far.clone(), x, "submatrix_scatter_add_")
    if _native.module().isa() == "simt":
        assert_bits(narrow_grad(far, far[:, :8], 1), narrow_grad(x, x[:, :8], 1), "submatrix_grad")


def test_weights_beyond_32_bits(place, tmp_path):
    """A rectangle at the end of a weight of 2^33 codes."""
    if place.type != "cpu":
        pytest.skip("tests/gpu has its own")
    rows, columns = (1 << 20) + 1, 1 << 13
    (packed, absmax, _, _), _ = packed_weight(1, columns, 64)
    files = {"packed": rows * columns // 2, "absmax": rows * columns // 64}
    big = {
        name: torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=part.dtype)
        for (name, size), part in zip(files.items(), (packed, absmax))
    }
    big["packed"][-packed.numel() :] = packed
    big["absmax"][-absmax.numel() :] = absmax
    got, wanted = torch.empty(1, columns), torch.empty(1, columns)
    dequantize_4bit_(got, big["packed"], big["absmax"], None, None, "nf4", 64, columns, rows - 1, 0)
    dequantize_4bit_(wanted, packed, absmax, None, None, "nf4", 64, columns, 0, 0)
    assert_bits(got, wanted)
