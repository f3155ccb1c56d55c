"""Both ways against the installed bitsandbytes. Skipped without it."""

import copy

import pytest
import torch
from comparing import assert_equal
from torch import nn

from inlay.bases import FourBit, Int8
from inlay.bases.bitsandbytes_format import convert_module, from_bitsandbytes, is_bitsandbytes, to_bitsandbytes

bnb = pytest.importorskip("bitsandbytes")

SHAPES = [(16, 128), (33, 64), (7, 50), (3, 43), (1, 1), (5, 4100)]


def dequantize(packed, state):
    """As one row: with rows, its AVX-512 kernel takes wrong scales where blocks straddle them."""
    row = copy.deepcopy(state)
    row.shape = torch.Size((1, state.shape.numel()))
    return bnb.functional.dequantize_4bit(packed, row).reshape(state.shape)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_four_bit(rows, columns, quant_type, dtype, nested):
    for blocksize in (32, 64, 256, 4096):
        w = (torch.randn(rows, columns) * torch.rand(())).to(dtype)
        packed, state = bnb.functional.quantize_4bit(
            w, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
        )
        storage = FourBit(rows, columns, quant_type, blocksize, nested)
        ours = to_bitsandbytes(storage, storage.quantize(w, "w"), dtype)
        theirs = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
        assert sorted(ours) == sorted(theirs)
        for key, tensor in theirs.items():
            assert_equal(ours[key], tensor, f"{blocksize} {key}")
        # their bytes read by us; ours read by them
        assert_equal(storage.dequantize(dtype, *from_bitsandbytes(theirs, "w")[1], None), dequantize(packed, state))
        stats = {key: tensor for key, tensor in ours.items() if key != "weight"}
        parameter = bnb.nn.Params4bit.from_prequantized(ours["weight"], stats, device="cpu")
        assert_equal(dequantize(parameter.data, parameter.quant_state), dequantize(packed, state))


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_int8(rows, columns):
    w = torch.randn(rows, columns).half()
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(w)
    storage = Int8(rows, columns)
    ours = to_bitsandbytes(storage, storage.quantize(w, "w"), torch.float16)
    assert_equal(ours["weight"], codes)
    assert_equal(ours["SCB"], scales)
    dense = bnb.functional.int8_vectorwise_dequant(codes, scales)
    assert_equal(storage.dequantize(torch.float32, codes, scales, None), dense)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_modules_convert_in_place_of_each_other(kind, bias):
    dense = nn.Linear(128, 24, bias=bias)
    if kind == "int8":
        theirs = bnb.nn.Linear8bitLt(128, 24, bias=bias, has_fp16_weights=False)
    else:
        theirs = bnb.nn.Linear4bit(128, 24, bias=bias, quant_type=kind, compress_statistics=True)
    assert is_bitsandbytes(theirs) and not is_bitsandbytes(dense)
    with pytest.raises(ValueError, match="l: this Linear.* holds no quantized weight yet"):
        convert_module(theirs, "l")
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu").eval()
    ours = convert_module(theirs, "l")
    assert not ours.training and (ours.bias is None) == (not bias)
    assert ours.tensors[0].data_ptr() == theirs.weight.data_ptr()  # the same bytes
    held = theirs.state_dict()
    for key, tensor in to_bitsandbytes(ours.storage, ours.tensors[:-1], torch.float32).items():
        assert_equal(tensor, held[key], key)
    x = torch.randn(40, 128)
    theirs.train()
    tolerance = 0.05 if kind == "int8" else 1e-5  # LLM.int8 quantizes x as well
    torch.testing.assert_close(ours(x), theirs(x), atol=tolerance, rtol=0)


def test_a_weight_repacked_for_inference_is_refused():
    module = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="q_proj: bitsandbytes has repacked this weight"):
        convert_module(module, "q_proj")
