"""Make the golden files beside this script with bitsandbytes. Run once; tests read the files, not the library.

four_bit.safetensors   per case: the weight, bitsandbytes' tensors for it, and what it dequantizes to
int8.safetensors       row-wise int8, the same
linear.safetensors     the state dict of one nested NF4 Linear4bit with a bias
nf4/ int8/             a tiny Llama quantized and saved by transformers + bitsandbytes, and logits.safetensors: input
                       ids and what the dense model with the dequantized weights answers

Dequantized values are computed with the weight as one row: with rows, bitsandbytes' AVX-512 kernel takes the scale of
the wrong block where blocks straddle rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# name: (rows, columns, dtype, quant type, blocksize, nested)
CASES = {
    "nf4": (4, 64, "bfloat16", "nf4", 64, False),
    "fp4": (4, 64, "bfloat16", "fp4", 64, False),
    "nf4_32": (5, 96, "float16", "nf4", 32, False),
    "fp4_32": (5, 96, "float32", "fp4", 32, False),
    "nf4_nested": (16, 128, "bfloat16", "nf4", 64, True),
    "fp4_nested": (16, 128, "float16", "fp4", 64, True),
    "nf4_nested_300_blocks": (75, 128, "bfloat16", "nf4", 32, True),
    "nf4_one_block_nested": (1, 40, "float32", "nf4", 64, True),
    "nf4_straddling_rows": (7, 50, "float32", "nf4", 64, False),
    "fp4_straddling_rows_nested": (9, 100, "bfloat16", "fp4", 64, True),
    "nf4_odd": (3, 43, "float32", "nf4", 64, False),
    "fp4_odd": (5, 13, "float16", "fp4", 32, False),
    "nf4_tail_of_one": (1, 65, "float32", "nf4", 64, False),
    "fp4_tail_of_one_nested": (1, 129, "bfloat16", "fp4", 128, True),
    "nf4_one_element": (1, 1, "float32", "nf4", 64, False),
    "nf4_128": (3, 128, "bfloat16", "nf4", 128, False),
    "nf4_256": (3, 200, "bfloat16", "nf4", 256, False),
    "fp4_512": (2, 300, "bfloat16", "fp4", 512, False),
    "nf4_1024": (3, 401, "bfloat16", "nf4", 1024, False),
    "nf4_2048": (2, 1100, "bfloat16", "nf4", 2048, False),
    "nf4_4096": (2, 2100, "bfloat16", "nf4", 4096, False),
    "fp4_4096_nested": (1, 4096, "bfloat16", "fp4", 4096, True),
    "nf4_zeros": (4, 64, "float32", "nf4", 64, False),
    "fp4_zeros": (4, 64, "bfloat16", "fp4", 64, False),
    "nf4_zero_tail": (1, 80, "float32", "nf4", 64, False),
    "nf4_denormals": (4, 64, "float32", "nf4", 64, False),
    "fp4_denormals": (4, 64, "float16", "fp4", 32, False),
    "nf4_bounds": (2, 64, "float32", "nf4", 64, False),
    "fp4_bounds": (2, 64, "float32", "fp4", 64, False),
    "nf4_equal_scales_nested": (4, 64, "float32", "nf4", 64, True),
}


def weight_for(name: str, rows: int, columns: int, quant_type: str) -> torch.Tensor:
    w = torch.randn(rows, columns)
    flat = w.view(-1)
    if name.endswith("zeros"):
        flat[64:192] = 0
    elif name.endswith("zero_tail"):
        flat[64:] = 0
    elif name.endswith("denormals"):
        flat[64:128] *= 1e-40  # a whole block
        flat[130:135] = torch.tensor([1e-7, -1e-7, 6e-8, 1e-45, -1e-45])  # some among others
    elif name.endswith("bounds"):  # the midpoints between levels, in a block whose absmax is 1, and their neighbours
        table = bitsandbytes.functional.get_4bit_type(quant_type, device="cpu").sort().values.unique()
        middle = (table[:-1] + table[1:]) / 2
        near = torch.cat(
            (middle, torch.nextafter(middle, torch.tensor(9.0)), torch.nextafter(middle, torch.tensor(-9.0)))
        )
        flat.zero_()
        flat[: near.numel()] = near
        flat[63] = 1.0
        flat[64:127], flat[127] = flat[:63].clone() * 0.37, 0.37  # the same, scaled
    elif "equal_scales" in name:
        flat.clamp_(-1, 1).view(-1, 64)[:, 0] = 1.0
    else:
        flat[::37] *= 8
    return w


def four_bit() -> dict[str, torch.Tensor]:
    held = {}
    for name, (rows, columns, dtype, quant_type, blocksize, nested) in CASES.items():
        w = weight_for(name, rows, columns, quant_type).to(DTYPES[dtype])
        packed, state = quantize_4bit(w, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)
        held[f"{name}/w"], held[f"{name}/weight"] = w, packed
        for key, value in state.as_dict(packed=True).items():
            held[f"{name}/weight.{key}"] = value
        as_row = copy.deepcopy(state)
        as_row.shape = torch.Size((1, w.numel()))
        held[f"{name}/dense"] = dequantize_4bit(packed, as_row).reshape(w.shape)
    return {key: value.contiguous().clone() for key, value in held.items()}


def int8() -> dict[str, torch.Tensor]:
    held = {}
    for name, w in {
        "plain": torch.randn(6, 40),
        "a_row_of_zeros": torch.randn(5, 33).index_fill_(0, torch.tensor([2]), 0),
        "outliers": torch.randn(4, 65) * torch.tensor([1e-3, 1.0, 50.0, 0.1])[:, None],
        "halves": torch.arange(-127, 128).float().div(2)[None, :],
    }.items():
        w = w.half()  # what bitsandbytes quantizes, whatever the model's dtype
        codes, scales, _ = int8_vectorwise_quant(w)
        held |= {f"{name}/w": w, f"{name}/weight": codes, f"{name}/SCB": scales}
        held[f"{name}/dense"] = int8_vectorwise_dequant(codes, scales)
    return held


def linear() -> dict[str, torch.Tensor]:
    module = bitsandbytes.nn.Linear4bit(96, 24, bias=True, quant_type="nf4", compress_statistics=True)
    module.load_state_dict(torch.nn.Linear(96, 24).state_dict())
    return {key: value.clone() for key, value in module.to("cpu").state_dict().items()}


def checkpoint(directory: Path, config: BitsAndBytesConfig) -> None:
    settings = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    dense = LlamaForCausalLM(settings).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as there:
        dense.save_pretrained(there)
        model = AutoModelForCausalLM.from_pretrained(there, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(directory)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                state = copy.deepcopy(module.weight.quant_state)
                shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
                dense.get_submodule(name).weight.copy_(dequantize_4bit(module.weight.data, state).reshape(shape))
            elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
                dense.get_submodule(name).weight.copy_(int8_vectorwise_dequant(module.weight.data, module.weight.SCB))
        ids = torch.randint(3, 40, (2, 7))
        exact = LlamaForCausalLM(settings)  # in fp32, its rotary frequencies too
        exact.load_state_dict(dense.state_dict())
        save_file({"ids": ids, "logits": exact.eval()(ids).logits}, directory / "logits.safetensors")
    (directory / "generation_config.json").unlink(missing_ok=True)
    config_file = directory / "config.json"
    values = json.loads(config_file.read_text())
    values.pop("_name_or_path", None)
    config_file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    torch.manual_seed(0)
    note = {"made_with": f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}"}
    save_file(four_bit(), HERE / "four_bit.safetensors", metadata=note)
    save_file(int8(), HERE / "int8.safetensors", metadata=note)
    save_file(linear(), HERE / "linear.safetensors", metadata=note)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    checkpoint(HERE / "nf4", nf4)
    checkpoint(HERE / "int8", BitsAndBytesConfig(load_in_8bit=True))


if __name__ == "__main__":
    main()
