"""A quantized model and a request for another base: an error, wherever the request is made."""

from __future__ import annotations

import itertools

import pytest
import transformers
from families import llama
from oracle import randomize

import inlay
from inlay.bases import QuantizedLinear, quantize_linears

BASES = {
    "nf4": inlay.BaseConfig("nf4"),
    "fp4": inlay.BaseConfig("fp4"),
    "int8": inlay.BaseConfig("int8"),
    "nf4 of 128": inlay.BaseConfig("nf4", blocksize=128),
    "nf4 twice": inlay.BaseConfig("nf4", double_quant=True),
}
PAIRS = [pair for pair in itertools.product(BASES, BASES) if pair[0] != pair[1]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    llama().bfloat16().save_pretrained(folder / "dense")
    for name, base in BASES.items():
        config = inlay.QuantizationConfig(base.base, blocksize=base.blocksize, double_quant=base.double_quant)
        inlay.from_pretrained(folder / "dense", quantization_config=config).save_pretrained(folder / name)
    return folder


def packed(name):
    model = llama()
    quantize_linears(model, BASES[name])
    return model


@pytest.mark.parametrize("held, asked", PAIRS)
def test_tune_and_load(held, asked, tmp_path):
    with pytest.raises(ValueError, match="wanted .* but it is quantized as"):
        inlay.tune(packed(held), inlay.S2FT(ratio=0.2), base=BASES[asked])
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2))
    randomize(tuned, 0.1)
    tuned.save_pretrained(tmp_path)
    model = packed(held)
    with pytest.raises(ValueError, match="wanted .* but it is quantized as"):
        inlay.load(model, tmp_path, base=BASES[asked])
    assert not hasattr(model, "inlay_state")
    inlay.load(model, tmp_path, base=BASES[held])


@pytest.mark.parametrize("held, asked", PAIRS)
def test_from_pretrained(held, asked, checkpoints):
    base = BASES[asked]
    config = inlay.QuantizationConfig(base.base, blocksize=base.blocksize, double_quant=base.double_quant)
    with pytest.raises(ValueError, match="quantized as .*, and quantization_config asks for"):
        inlay.from_pretrained(checkpoints / held, quantization_config=config)
    with pytest.raises(ValueError, match="but it is quantized as"):
        inlay.tune(inlay.from_pretrained(checkpoints / held), inlay.S2FT(ratio=0.2), base=base)


@pytest.mark.parametrize("name", BASES)
def test_the_same_base_is_taken(name, checkpoints):
    base = BASES[name]
    config = inlay.QuantizationConfig(base.base, blocksize=base.blocksize, double_quant=base.double_quant)
    model = inlay.from_pretrained(checkpoints / name, quantization_config=config)
    assert isinstance(inlay.tune(model, inlay.S2FT(ratio=0.2), base=base).model.layers[0].mlp.up_proj, QuantizedLinear)


def test_what_bitsandbytes_asks_for(checkpoints):
    four_bit = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(ValueError, match="quantization_config asks for"):
        inlay.from_pretrained(checkpoints / "int8", quantization_config=four_bit)
    inlay.from_pretrained(checkpoints / "nf4", quantization_config=four_bit)
    with pytest.raises(ValueError, match="wanted inlay's or bitsandbytes'"):
        inlay.from_pretrained(checkpoints / "nf4", quantization_config={"quant_method": "gptq", "bits": 4})


def test_from_the_shell(checkpoints, tmp_path, capsys):
    from inlay.cli import main

    config = tmp_path / "config.yaml"
    model, data = checkpoints / "int8", tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    config.write_text(f"model: {model}\nmethod: s2ft\nbase: nf4\ndata: {data}\noutput_dir: {tmp_path}\n")
    transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), eos_token="a").save_pretrained(model)
    assert main(["train", str(config)]) != 0
    assert "it is quantized as" in capsys.readouterr().err


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
