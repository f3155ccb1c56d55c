"""Streams, graphs, devices and sizes: what the emulation cannot show."""

from __future__ import annotations

import pytest
import torch
from _compare import assert_bits

from inlay import _native, ops
from inlay.ops import force_path
from inlay.ops._registry import RAW_OPS
from inlay.ops.quantize_blockwise import dequantize_4bit, quantize_4bit
from inlay.ops.quantized_linear import quantized_linear, split_scratch


def _swiglu(gate, up):
    return RAW_OPS["swiglu_forward"](gate, up, "silu")


def test_kernels_follow_the_current_stream(gpu):
    """The input is filled late on a side stream: a kernel on another stream would read what was there before."""
    side = torch.cuda.Stream()
    big = torch.randn(4096, 4096, device=gpu)
    gate = torch.zeros(64, 4096, device=gpu)
    wanted = torch.nn.functional.silu(torch.full_like(gate, 2.0))
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20):
            big = big @ big * 1e-4
        gate.fill_(2.0)
        got = _swiglu(gate, torch.ones_like(gate))
    side.synchronize()
    torch.testing.assert_close(got, wanted)


def test_nothing_waits_for_the_device(gpu):
    """With a long queue in front, calls return while it still runs."""
    big, x = torch.randn(8192, 8192, device=gpu), torch.randn(64, 4096, device=gpu)
    _swiglu(x, x)
    RAW_OPS["rms_norm_forward"](x, None, 1e-5, 0.0)  # a kernel's first launch loads it, which may wait
    torch.cuda.synchronize()
    for _ in range(20):
        big = big @ big * 1e-4
    done = torch.cuda.Event()
    done.record()
    _swiglu(x, x)
    RAW_OPS["rms_norm_forward"](x, None, 1e-5, 0.0)
    assert not done.query()
    torch.cuda.synchronize()


def test_capture_and_replay(gpu):
    storage = quantize_4bit(torch.randn(512, 256, device=gpu), "nf4", 64)
    x, weight = torch.randn(4, 256, device=gpu).bfloat16(), torch.randn(256, device=gpu)

    def step():
        y, _ = RAW_OPS["rms_norm_forward"](x, weight, 1e-5, 0.0)
        return quantized_linear(y, *storage, None, None, None, "nf4", 64, 512)

    step()  # fills the caches of tables
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn(4, 256).bfloat16())
    graph.replay()
    assert_bits(captured.cpu(), step().cpu())


def test_blocks_share_tiles_on_streams_and_in_graphs(gpu):
    """Five tiles of 16 chunks: the same bits on every stream and at every replay, and counters that are zero again."""
    dense = torch.randn(80, 8192, device=gpu) / 90
    packed, absmax = quantize_4bit(dense, "nf4", 64)
    exact = dequantize_4bit(packed, absmax, "nf4", 64, 80, 8192, torch.float32).double()
    x = torch.randn(3, 8192, device=gpu).bfloat16()
    used = []

    def product():
        used.append(split_scratch(x, 80)[0])
        return quantized_linear(x, packed, absmax, None, None, None, "nf4", 64, 80)

    first = product()
    torch.cuda.synchronize()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product()
    for _ in range(3):
        with torch.cuda.stream(side):
            beside = product()
        graph.replay()
        again = product()
        torch.cuda.synchronize()
        for got in (beside, captured, again):
            assert_bits(got.cpu(), first.cpu())
    wanted = x.double() @ exact.t()
    assert float((first.double() - wanted).norm() / wanted.norm()) < 5e-3
    assert len({counters.data_ptr() for counters in used}) == 3 and not any(bool(c.any()) for c in used)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chosen", [16, 40, 64, 90])  # 90: torch.mm
def test_submatrix_grad(gpu, dtype, chosen):
    """The sum over tokens stays fp32, whatever the inputs are."""
    dy, x = torch.randn(4099, 96, device=gpu).to(dtype), torch.randn(4099, chosen, device=gpu).to(dtype)
    got, exact = RAW_OPS["submatrix_grad"](dy, x), dy.double().t() @ x.double()
    assert got.dtype == torch.float32 and float((got - exact).norm() / exact.norm()) < 5e-5
    assert_bits(RAW_OPS["submatrix_grad"](dy, x).cpu(), got.cpu(), "again")


@pytest.mark.parametrize("base", [None, "nf4"])
def test_a_tuned_model_trains(gpu, base):
    """A few steps of S2FT on a small model: the loss falls and is close to the CPU's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import inlay

    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    tokens = torch.randint(0, 128, (2, 33))

    def losses(device):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(device)
        inlay.tune(model, inlay.S2FT(ratio=0.1), **({"base": base} if base else {}))
        optimizer = inlay.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        series = []
        for _ in range(5):
            loss = model(input_ids=tokens.to(device), labels=tokens.to(device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            series.append(float(loss.detach()))
        return series

    with force_path(None):
        on_gpu, on_cpu = losses(gpu), losses("cpu")
    assert on_gpu[-1] < on_gpu[0]
    torch.testing.assert_close(torch.tensor(on_gpu), torch.tensor(on_cpu), rtol=2e-3, atol=0)


def test_another_device(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x = torch.randn(5, 512)
    here, there = (_swiglu(x.to(f"cuda:{i}"), x.to(f"cuda:{i}")) for i in (0, 1))
    assert there.device.index == 1 and torch.cuda.current_device() == 0
    assert_bits(here.cpu(), there.cpu())


def test_mixed_devices_are_refused(gpu):
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match="move them to one device"):
        ops.swiglu(x.to(gpu), x)
    with pytest.raises(ValueError, match="wanted all on one device"):
        _native.module().swiglu_forward(x.to(gpu), x.to(gpu), x, 0)


@pytest.mark.parametrize("shift", range(1, 8))
def test_misaligned_rows(gpu, shift):
    """Rows that start anywhere: 16-byte loads must not be used."""
    x = torch.randn(6, 264, device=gpu).bfloat16()
    view = x[:, shift : shift + 256]
    assert_bits(_swiglu(view, view).cpu(), _swiglu(view.contiguous(), view.contiguous()).cpu())
    got, wanted = (RAW_OPS["rms_norm_forward"](t, None, 1e-5, 0.0)[0] for t in (view, view.contiguous()))
    torch.testing.assert_close(got, wanted)


def test_more_than_two_to_the_31_elements(gpu):
    rows, width = 33, 1 << 26
    if torch.cuda.mem_get_info()[0] < 24 * rows * width // 4:
        pytest.skip("not enough memory")
    gate = torch.zeros(rows, width, dtype=torch.bfloat16, device=gpu)
    gate[-1, -8:] = 1.0
    h = _swiglu(gate, gate)
    assert bool((h[-1, -8:] > 0.7).all()) and int(h.count_nonzero()) == 8


def test_large_weights_round_trip(gpu):
    """70,000 columns of 40,000 rows: 2.8e9 codes."""
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("not enough memory")
    w = torch.zeros(40_000, 70_000, dtype=torch.bfloat16, device=gpu)
    w[-1] = torch.randn(70_000, device=gpu)
    packed, absmax = quantize_4bit(w, "nf4", 64)
    last = w[-1].clone()
    del w
    dense = dequantize_4bit(packed, absmax, "nf4", 64, 40_000, 70_000, torch.bfloat16)
    assert float((dense[-1] - last).abs().max()) < 1.0 and not bool(dense[:-1].any())


@pytest.mark.parametrize("rows", [1, 16, 64, 65])
def test_decoding_with_lora(gpu, rows):
    """A tuned four-bit layer without gradients: one op up to 64 rows, the same numbers as the layer that trains."""
    from torch import nn

    import inlay
    from inlay.bases import BaseConfig, quantize_linears

    model = nn.Sequential(nn.Linear(256, 192)).to(gpu, torch.bfloat16)
    quantize_linears(model, BaseConfig("nf4", double_quant=True))
    inlay.tune(model, inlay.LoRA(r=8, target_modules=["0"]))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(rows, 256, device=gpu).bfloat16()
    with force_path(None):
        trained = model(x.requires_grad_()).detach()
        with torch.no_grad():
            decoded = model(x)
        with force_path("reference"), torch.no_grad():
            plain = model(x)
    for got in (decoded, trained):
        assert float((got.double() - plain.double()).norm() / plain.double().norm()) < 6e-3
