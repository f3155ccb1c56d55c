"""bitsandbytes' storage byte for byte, from golden files: the library itself is not needed."""

import json

import pytest
import torch
from comparing import assert_equal
from golden import GOLDEN, cases, stored
from safetensors.torch import load_file
from torch import nn

from inlay import _native, ops
from inlay.bases import FourBit, Int8
from inlay.bases.bitsandbytes_format import STATE_PREFIX, from_bitsandbytes, missing_keys, to_bitsandbytes

FOUR_BIT, INT8 = cases("four_bit.safetensors"), cases("int8.safetensors")


@pytest.fixture(params=["reference", *(_native.module().available_isas() if _native.available() else ())])
def path(request):
    if request.param == "reference":
        with ops.force_path("reference"):
            yield
        return
    _native.module().set_isa(request.param)
    with ops.force_path("native"):
        yield
    _native.module().set_isa("")


def assert_same_bytes(ours, wanted, what=""):
    assert sorted(ours) == sorted(wanted), what
    for key, tensor in wanted.items():
        assert ours[key].dtype == tensor.dtype and ours[key].shape == tensor.shape, f"{what} {key}"
        same = ours[key].contiguous().reshape(-1).view(torch.uint8) == tensor.contiguous().reshape(-1).view(torch.uint8)
        assert bool(same.all()), f"{what} {key}: {int((~same).sum())} of {same.numel()} bytes differ"


def storage_of(case):
    storage, tensors, dtype = from_bitsandbytes(stored(case), "case")
    return storage, tensors, dtype


@pytest.mark.parametrize("name", FOUR_BIT)
def test_quantize_writes_its_bytes(path, name):
    case = FOUR_BIT[name]
    storage, _, dtype = storage_of(case)
    assert dtype == case["w"].dtype
    assert storage == FourBit(*case["w"].shape, storage.quant_type, storage.blocksize, "weight.nested_absmax" in case)
    ours = to_bitsandbytes(storage, storage.quantize(case["w"], name), dtype)
    assert_same_bytes(ours, stored(case), name)


@pytest.mark.parametrize("name", FOUR_BIT)
def test_dequantize_gives_its_values(path, name):
    case = FOUR_BIT[name]
    storage, tensors, dtype = storage_of(case)
    assert_equal(storage.dequantize(dtype, *tensors, None), case["dense"], name)
    assert_same_bytes(to_bitsandbytes(storage, tensors, dtype), stored(case), "and back")


@pytest.mark.parametrize("name", INT8)
def test_int8(name):
    case = INT8[name]
    held = {**stored(case), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    storage, tensors, dtype = from_bitsandbytes(held, name)
    assert storage == Int8(*case["w"].shape) and dtype is None
    assert_equal(storage.dequantize(case["dense"].dtype, *tensors, None), case["dense"], name)
    ours = to_bitsandbytes(storage, storage.quantize(case["w"], name), torch.float16)
    assert_same_bytes(ours, held, name)


def test_state_dict_of_a_linear():
    held = load_file(GOLDEN / "linear.safetensors")
    storage, tensors, dtype = from_bitsandbytes({k: v for k, v in held.items() if k != "bias"}, "linear")
    assert storage == FourBit(24, 96, "nf4", 64, True) and dtype == torch.float32
    assert_same_bytes({**to_bitsandbytes(storage, tensors, dtype), "bias": held["bias"]}, held)


def test_other_storage_dtypes_and_layouts():
    """bnb_4bit_quant_storage views the bytes as floats; old files keep them as a row."""
    case = FOUR_BIT["nf4_nested"]
    storage, tensors, _ = storage_of(case)
    packed = case["weight"]
    flat = packed.view(-1)
    for weight in (flat.view(torch.bfloat16)[:, None], flat.view(torch.float32)[:, None], flat[None]):
        again = from_bitsandbytes({**stored(case), "weight": weight}, "case")
        assert again[0] == storage
        assert_equal(again[1][0], tensors[0])


@pytest.mark.parametrize("name", ["nf4", "nf4_nested", "fp4_32"])
def test_incomplete_keys_are_named(name):
    case = stored(FOUR_BIT[name])
    for key in case:
        rest = {k: v for k, v in case.items() if k != key}
        if key.startswith(STATE_PREFIX):
            key = "bitsandbytes__<nf4 or fp4>"
        with pytest.raises(ValueError, match=rf"q_proj: wanted the tensors .* without \[.*{key}.*incomplete"):
            from_bitsandbytes(rest, "q_proj")
    for key in ("weight", "SCB"):
        rest = {k: v for k, v in {"weight": 0, "SCB": 0, "weight_format": 0}.items() if k != key}
        assert missing_keys(rest) == [key]


def test_broken_tensors_are_refused():
    case = stored(FOUR_BIT["nf4_nested"])
    state_key = STATE_PREFIX + "nf4"
    state = json.loads(bytes(case[state_key].tolist()))

    def packed(**changes):
        values = {k: v for k, v in (state | changes).items() if v is not None}
        return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)

    for change, message in (
        ({"weight": case["weight"][:-1]}, r"packed: wanted 1024 bytes of uint8 for \[16, 128\], got 1023"),
        ({"weight.absmax": case["weight.absmax"][1:]}, "codes: wanted 32 uint8 scales, got 31"),
        ({"weight.nested_absmax": case["weight.nested_absmax"].repeat(2)}, "absmax: wanted 1 float32 scales, got 2"),
        ({"weight.quant_map": case["weight.quant_map"] * 2}, "weight.quant_map: wanted this format's 16 levels"),
        ({"weight.nested_quant_map": case["weight.quant_map"]}, "nested_quant_map: wanted this format's 256 levels"),
        ({state_key: torch.tensor([7, 8], dtype=torch.uint8)}, "is no JSON"),
        ({state_key: packed(quant_type="fp4")}, "wanted a JSON object with that quant_type"),
        ({state_key: packed(shape=None)}, r"the quant_state lacks \['shape'\]"),
        ({state_key: packed(nested_offset=None)}, r"the quant_state lacks \['nested_offset'\]"),
        ({state_key: packed(shape=[16, 64])}, "packed: wanted 512 bytes"),
        ({state_key: packed(blocksize=48)}, "blocksize: wanted one of"),
        ({state_key: packed(nested_blocksize=128)}, "wanted scales in blocks of 256, got blocks of 128"),
        ({state_key: packed(dtype="float7")}, "wanted the shape and dtype of a weight, got .* 'float7'"),
    ):
        with pytest.raises(ValueError, match=f"q_proj.*{message}"):
            from_bitsandbytes(case | change, "q_proj")
    int8 = {**stored(INT8["plain"]), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    for change, message in (
        ({"SCB": int8["SCB"][1:]}, r"SCB: wanted float32 \[6\], one scale per row, got torch.float32 \(5,\)"),
        ({"weight": int8["weight"].view(torch.uint8)}, "weight: wanted int8"),
        ({"weight_format": torch.tensor(2)}, "weight_format: wanted 0"),
    ):
        with pytest.raises(ValueError, match=message):
            from_bitsandbytes(int8 | change, "q_proj")


def test_bytes_are_shared_not_copied():
    case = stored(FOUR_BIT["nf4"])
    _, tensors, _ = from_bitsandbytes(case, "case")
    assert tensors[0].data_ptr() == case["weight"].data_ptr()
    assert isinstance(nn.Parameter(tensors[0], requires_grad=False), nn.Parameter)
