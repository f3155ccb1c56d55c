"""x·dequant(W)ᵀ and its input gradient against float64, on odd shapes and on every path."""

from types import SimpleNamespace

import pytest
import torch
from _compare import DTYPES, assert_bits, padded_rows, strided
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from inlay import _native, ops
from inlay.bases import BaseConfig, QuantizedLinear
from inlay.ops._registry import RAW_OPS
from inlay.ops.lora_linear import lora_linear
from inlay.ops.quantize_blockwise import dequantize_absmax, levels, quantize_4bit, quantize_absmax
from inlay.ops.quantized_linear import (
    PANEL_BYTES,
    SMALL_ROWS,
    quantized_linear,
    quantized_linear_backward_input,
    quantized_linear_small,
    split_scratch,
    workspace,
)

#: Largest relative Frobenius error. bf16: one rounding of the weights and one of the output is 2.33e-3 in expectation;
#: fp16 has three more bits; fp32 only adds up roundings of its sums (most on the path without vectors).
GATES = {torch.bfloat16: 3.0e-3, torch.float16: 4.0e-4, torch.float32: 1e-5}

ROWS = (0, 1, 2, 7, 8, 9, 16, 17, 63, 64, 65, 255)

# out, in, blocksize: whole blocks; blocks that straddle rows; odd columns; odd numel; one row; one column
SHAPES = [
    (48, 256, 64),
    (33, 128, 64),
    (7, 4096, 4096),
    (19, 100, 64),
    (13, 77, 32),
    (5, 203, 128),
    (1, 64, 32),
    (64, 1, 64),
    (130, 192, 64),
    (21, 160, 32),
]


def case(out, width, blocksize, dtype=torch.bfloat16, quant_type="nf4", nested=False, bias=False):
    """Storage of a random weight, and what it means in float64."""
    packed, absmax = quantize_4bit(torch.randn(out, width) / width**0.5, quant_type, blocksize)
    scales, codes, offset = absmax, None, None
    if nested:
        codes, absmax, offset = quantize_absmax(absmax)
        scales = dequantize_absmax(codes, absmax, offset)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[: out * width].long()
    exact = levels(quant_type).double()[nibbles] * scales.double().repeat_interleave(blocksize)[: out * width]
    b = torch.randn(out).to(dtype) if bias else None
    return (packed, absmax, codes, offset), b, exact.view(out, width)


def forward(x, storage, bias, quant_type, blocksize, out):
    return quantized_linear(x, *storage, bias, quant_type, blocksize, out)


def assert_within(ours, exact, dtype, what):
    assert ours.dtype == dtype and ours.shape == exact.shape, f"{what}: {ours.dtype} {tuple(ours.shape)}"
    if ours.numel():
        # A few numbers may all round the same way; an aggregate of many may not.
        gate = GATES[dtype] * (1 if ours.numel() >= 1000 else 2)
        error = float((ours.double() - exact).norm() / exact.norm())
        assert error <= gate, f"{what}: relative error {error:.2e}, allowed {gate:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out, width, blocksize", SHAPES)
def test_forward_and_backward(path, dtype, out, width, blocksize):
    nested, quant_type = width % 2 == 0, "fp4" if out % 2 else "nf4"
    storage, bias, exact = case(out, width, blocksize, dtype, quant_type, nested, bias=out % 3 == 0)
    for rows in ROWS:
        x, dy = torch.randn(rows, width).to(dtype), torch.randn(rows, out).to(dtype)
        wanted = functional.linear(x.double(), exact, None if bias is None else bias.double())
        assert_within(forward(x, storage, bias, quant_type, blocksize, out), wanted, dtype, f"forward, {rows} rows")
        dx = quantized_linear_backward_input(dy, *storage, quant_type, blocksize, width)
        assert_within(dx, dy.double() @ exact, dtype, f"backward, {rows} rows")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make_view", [strided, padded_rows])
@pytest.mark.parametrize("rows", [3, SMALL_ROWS + 5])
def test_views_and_leading_dimensions(path, dtype, make_view, rows):
    storage, bias, _ = case(24, 128, 64, dtype, bias=True)
    x = torch.randn(rows, 128).to(dtype)
    plain = forward(x, storage, bias, "nf4", 64, 24)
    same = torch.testing.assert_close if path == "reference" else assert_bits  # torch sums by strides on some CPUs
    same(forward(make_view(x), storage, bias, "nf4", 64, 24), plain)
    deep = forward(x.view(rows, 1, 1, 128), storage, bias, "nf4", 64, 24)
    assert_bits(deep, plain.view(rows, 1, 1, 24), "leading dimensions")
    assert forward(x[0], storage, bias, "nf4", 64, 24).shape == (24,)
    dy = torch.randn(rows, 24).to(dtype)
    dx = quantized_linear_backward_input(dy, *storage, "nf4", 64, 128)
    same(quantized_linear_backward_input(make_view(dy), *storage, "nf4", 64, 128), dx)


@pytest.mark.parametrize("rows", [1, 5, SMALL_ROWS])
def test_decoding_needs_no_rounded_weights(path, rows):
    """Decoded in registers, weights stay fp32: only the output is rounded, an error of 1.66e-3 in expectation.

    AMX multiplies bf16 only; it is held to the gate of all other products.
    """
    storage, _, exact = case(1024, 512, 64, nested=True)
    x = torch.randn(rows, 512).bfloat16()
    gate = GATES[torch.bfloat16] if path == "amx" else 1.9e-3
    y = forward(x, storage, None, "nf4", 64, 1024)
    assert float((y.double() - x.double() @ exact.t()).norm() / (x.double() @ exact.t()).norm()) < gate


def test_several_panels(path, monkeypatch):
    """Panels of a few rows or columns, the last one smaller, change nothing."""
    storage, bias, _ = case(50, 96, 64, bias=True)
    x, dy = torch.randn(40, 96).bfloat16(), torch.randn(40, 50).bfloat16()

    def both():
        y = forward(x, storage, bias, "nf4", 64, 50)
        return y, quantized_linear_backward_input(dy, *storage, "nf4", 64, 96)

    whole = both()
    monkeypatch.setattr("inlay.ops.quantized_linear.PANEL_BYTES", 7 * 96 * 2)
    for got, wanted in zip(both(), whole, strict=True):
        torch.testing.assert_close(got, wanted)


def test_float64_is_exact():
    """For gradcheck and oracles: the reference computes in float64 for a float64 input."""
    storage, _, exact = case(24, 70, 64)
    weight = exact.float().double()  # a stored weight is the fp32 product
    for rows in (3, 40):
        x = torch.randn(rows, 70, dtype=torch.float64)
        torch.testing.assert_close(forward(x, storage, None, "nf4", 64, 24), x @ weight.t(), rtol=1e-13, atol=1e-13)


def test_no_graph_is_recorded():
    """Gradients belong to the caller's Function; a graph here would keep a panel that is overwritten."""
    storage, _, _ = case(24, 64, 64)
    x = torch.randn(40, 64, requires_grad=True)
    assert not forward(x, storage, None, "nf4", 64, 24).requires_grad
    assert not quantized_linear_backward_input(
        torch.randn(40, 24, requires_grad=True), *storage, "nf4", 64, 64
    ).requires_grad


def test_workspace_survives_modes():
    """What inference mode or tracing allocated must not be what a later call writes to."""
    storage, _, _ = case(24, 64, 64)
    x = torch.randn(40, 64, dtype=torch.float16)
    with torch.inference_mode():
        first = forward(x, storage, None, "nf4", 64, 24)
    assert not workspace(1, x).is_inference()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        forward(mode.from_tensor(x), storage, None, "nf4", 64, 24)
    with ops.force_path("reference"):
        torch.testing.assert_close(forward(x, storage, None, "nf4", 64, 24), first)


def test_workspace_is_bounded():
    """No dense copy outlives the call, however large the weight."""
    storage, _, _ = case(2048, 2048, 64)
    x = torch.randn(20, 2048).bfloat16()
    forward(x, storage, None, "nf4", 64, 2048)
    quantized_linear_backward_input(torch.randn(20, 2048).bfloat16(), *storage, "nf4", 64, 2048)
    assert workspace(1, x).untyped_storage().nbytes() <= PANEL_BYTES


def test_calls_at_the_same_time_have_their_own_counters(monkeypatch):
    """A row for each stream, and for each graph and stream it is captured from; none is zeroed during a capture."""
    work = [7, 0]  # stream and graph
    engine = SimpleNamespace(current_work=lambda device: tuple(work))
    monkeypatch.setattr("inlay.ops.quantized_linear.module", lambda: engine)
    monkeypatch.setattr("inlay.ops.quantized_linear._scratch_sizes", lambda *_: (4, 100))
    monkeypatch.setattr("inlay.ops.quantized_linear._counters", {})
    monkeypatch.setattr("inlay.ops.quantized_linear._unused_counters", {})
    monkeypatch.setattr("inlay.ops.quantized_linear.COUNTER_ROWS", 4)
    x = SimpleNamespace(is_cuda=True, get_device=lambda: 0, shape=(3, 64), device=torch.device("cpu"))

    def counters(stream, graph):
        work[:] = stream, graph
        found, sums = split_scratch(x, 24)
        assert sums.shape == (100,) and sums.dtype == torch.float32
        return found

    assert counters(7, 1) is None  # the first call of all is captured
    keys = (7, 0), (8, 0), (7, 1), (8, 1)
    rows = [counters(*key) for key in keys]
    assert all(row.shape == (4,) and row.dtype == torch.int64 and not row.any() for row in rows)
    assert len({row.data_ptr() for row in rows}) == 4
    assert counters(7, 2) is None  # all taken
    assert counters(9, 0).data_ptr() not in {row.data_ptr() for row in rows}  # of the next four
    assert all(counters(*key) is row for key, row in zip(keys, rows, strict=True))
    assert split_scratch(torch.ones(3, 64), 24) == (None, None)


def test_refuses_what_does_not_fit(path):
    storage, _, _ = case(24, 64, 64)
    for rows in (2, 40):
        with pytest.raises(ValueError, match=r"packed: wanted 792 bytes of uint8 for \[24, 66\], got 768"):
            forward(torch.randn(rows, 66), storage, None, "nf4", 64, 24)
        with pytest.raises(ValueError, match="absmax: wanted 48 float32 scales, got 24"):
            forward(torch.randn(rows, 64), storage, None, "nf4", 32, 24)
        with pytest.raises(ValueError, match="quant_type: wanted one of"):
            forward(torch.randn(rows, 64), storage, None, "nf3", 64, 24)
        with pytest.raises(TypeError, match="x: wanted a float32, bfloat16 or float16 tensor, got torch.int64"):
            forward(torch.ones(rows, 64, dtype=torch.int64), storage, None, "nf4", 64, 24)
        with pytest.raises(ValueError, match="packed: wanted"):
            quantized_linear_backward_input(torch.randn(rows, 25), *storage, "nf4", 64, 64)
    meta = torch.randn(2, 64, device="meta")
    with pytest.raises(ValueError, match="packed: wanted meta as x, got cpu"):
        forward(meta, storage, None, "nf4", 64, 24)


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck(path, nested):
    storage, bias, _ = case(6, 64, 32, nested=nested, bias=True)
    args = (torch.randn(3, 64).bfloat16(), *storage, bias, "nf4", 32, 6)
    torch.library.opcheck(RAW_OPS["quantized_linear_small"].overload, args)


@pytest.mark.skipif(not _native.available(), reason="no native module")
@pytest.mark.parametrize("out, width", [(301, 1216), (201, 603)])
def test_results_do_not_depend_on_threads(out, width):
    storage, _, _ = case(out, width, 64)
    x = torch.randn(5, width).bfloat16()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(quantized_linear_small(x, *storage, None, "nf4", 64, out))
    finally:
        torch.set_num_threads(before)
    assert_bits(*results)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("rows", [3, 40])
def test_compiles(base, rows):
    """Without a graph break, alone and under LoRA, with the same results."""
    config = BaseConfig(base)
    linear = QuantizedLinear.of(torch.nn.Linear(96, 24), config.storage(None, 24, 96), "l")
    inputs = [torch.randn(s, requires_grad=True) for s in ((rows, 96), (4, 96), (24, 4))]

    def step(x, a, b):
        return (lora_linear(x, a, b, 2.0, linear.storage, *linear.tensors) * linear(x)).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(step(*inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), wanted)
