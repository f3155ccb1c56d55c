"""Quantized models through transformers' own from_pretrained and save_pretrained, without bitsandbytes."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from comparing import assert_close, assert_equal, assert_state_equal, max_diff
from families import BY_NAME, llama, prompt, text_batch
from golden import GOLDEN
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2LMHeadModel

import inlay
from inlay.bases import FourBit, Int8, QuantizedLinear, quantize_linears
from inlay.integrations import quantizer


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense")
    llama(attention_bias=True).bfloat16().save_pretrained(directory)
    return directory


def load(directory, *args, cls=AutoModelForCausalLM, **options):
    return cls.from_pretrained(directory, quantization_config=inlay.QuantizationConfig(*args, **options))


def quantized(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def assert_same_tensors(ours, wanted):
    assert sorted(ours) == sorted(wanted)
    for key, tensor in wanted.items():
        assert_equal(ours[key], tensor, key)


def run(code, **env):
    """In a fresh interpreter that cannot import bitsandbytes."""
    code = "import sys; sys.modules['bitsandbytes'] = None\n" + textwrap.dedent(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- quantizing while loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"double_quant": True, "blocksize": 128},
        {"base": "fp4"},
        {"base": "int8"},
        {"skip_modules": ["lm_head", "k_proj"], "overrides": {"down_proj": "int8", "o_proj": None}},
    ],
    ids=str,
)
def test_loading_quantizes_as_tune_does(dense_dir, options):
    loaded = load(dense_dir, **options)
    config = inlay.BaseConfig(**options)
    wanted = AutoModelForCausalLM.from_pretrained(dense_dir)
    quantize_linears(wanted, config)
    assert quantized(loaded).keys() == config.names(wanted).keys()
    assert_state_equal(loaded.state_dict(), wanted.state_dict())
    assert type(loaded.lm_head) is nn.Linear and not loaded.training
    assert loaded.is_quantized and loaded.hf_quantizer.is_trainable and loaded.hf_quantizer.is_qat_trainable
    ids = prompt()
    assert_equal(loaded(ids).logits, wanted.eval()(ids).logits)


def test_registered_once_and_on_first_use():
    code = """
        import inlay
        assert 'transformers' not in sys.modules, 'importing inlay must not import transformers'
        inlay.QuantizationConfig
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as mapping
        first = mapping['inlay']
        import importlib, inlay.integrations.quantizer as module
        importlib.reload(module)
        assert mapping['inlay'] is first
    """
    run(code)


def test_no_dense_weight_outlives_its_turn(dense_dir, monkeypatch):
    """At each tensor at most the one before it is still alive."""
    seen, alive = [], []
    convert = quantizer._Quantize.convert

    def watched(self, input_dict, *args, **kwargs):
        values = [v[0] if isinstance(v, list) else v for v in input_dict.values()]
        alive.append(sum(ref() is not None for ref in seen))
        seen.extend(weakref.ref(v) for v in values)
        return convert(self, input_dict, *args, **kwargs)

    monkeypatch.setattr(quantizer._Quantize, "convert", watched)
    model = load(dense_dir)
    assert len(alive) == len(quantized(model)) == 14
    assert max(alive) <= 1


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_while_loading(tmp_path):
    """Anonymous memory stays below the packed model plus two dense tensors (and what the interpreter itself takes)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)  # 134 M weights, 268 MB
    out = run(
        f"""
        import threading, time, gc, torch, inlay
        from transformers import AutoModelForCausalLM
        def anon():
            with open('/proc/self/status') as file:
                return next(int(l.split()[1]) / 1024 for l in file if l.startswith('RssAnon'))
        config = inlay.QuantizationConfig('nf4')
        torch.randn(600, 600) @ torch.randn(600, 600)
        gc.collect()
        before, peak, stop = anon(), [0.0], threading.Event()
        def watch():
            while not stop.is_set():
                peak[0] = max(peak[0], anon()); time.sleep(0.001)
        thread = threading.Thread(target=watch); thread.start()
        model = AutoModelForCausalLM.from_pretrained('{tmp_path}', quantization_config=config)
        stop.set(); thread.join()
        held = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        print(peak[0] - before, held)
        """
    )
    peak, held = map(float, out.split())
    dense = 4096 * 1024 * 2 / 2**20
    assert held < 80
    assert peak <= held + 2 * dense + 30, f"{peak:.0f} MB above the start, the packed model is {held:.0f}"


def test_dtype_is_the_users(dense_dir):
    model = AutoModelForCausalLM.from_pretrained(
        dense_dir, dtype=torch.float32, quantization_config=inlay.QuantizationConfig()
    )
    assert (
        model.dtype
        == torch.float32
        == model.model.norm.weight.dtype
        == model.model.layers[0].self_attn.q_proj.weight.dtype
    )
    model = inlay.from_pretrained(GOLDEN / "nf4", dtype=torch.float32)
    assert model.model.norm.weight.dtype == torch.float32 == model.model.layers[0].self_attn.q_proj.weight.dtype
    assert model(prompt(tokens=4) % 40).logits.dtype == torch.float32


def test_bad_weights_are_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")  # whatever another test has set it to
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load(tmp_path)
    assert "model.layers.1.mlp.up_proj: inlay.quantize_4bit: w: wanted finite values, got NaN" in caplog.text


def test_bad_options():
    for options, message in (
        ({"base": "nf5"}, "base: wanted one of .*'nf4'.* got 'nf5'"),
        ({"blocksize": 100}, "blocksize: wanted one of"),
        ({"overrides": {"o_proj": "int4"}}, "got 'int4'"),
        ({"quant_method": "gptq"}, "quant_method: wanted 'inlay', got 'gptq'"),
    ):
        with pytest.raises(ValueError, match=message):
            inlay.QuantizationConfig(**options)


def test_names_nothing(dense_dir):
    with pytest.raises(ValueError, match="'q_prj', which no linear of this model ends in"):
        load(dense_dir, skip_modules=["q_prj"])
    with pytest.raises(ValueError, match="names no linear"):
        load(
            dense_dir,
            skip_modules=["lm_head", *["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]],
        )


def test_tied_weights_stay_dense(tmp_path):
    BY_NAME["gemma"].build().save_pretrained(tmp_path)
    model = load(tmp_path, skip_modules=[])
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert len(quantized(model)) == 14


# --- saving and loading again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"double_quant": True}, {"base": "fp4", "blocksize": 32}, {"base": "int8"}], ids=str
)
def test_saved_as_bitsandbytes_and_loaded_again(dense_dir, tmp_path, options):
    model = load(dense_dir, **options)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "bitsandbytes" and saved["llm_int8_skip_modules"] == ["lm_head"]
    assert saved["load_in_8bit"] == (options.get("base") == "int8") != saved["load_in_4bit"]
    again = inlay.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert_state_equal(again.state_dict(), model.state_dict())
    again.save_pretrained(tmp_path / "again")
    assert_same_tensors(load_file(tmp_path / "again/model.safetensors"), load_file(tmp_path / "model.safetensors"))


def test_a_mixture_is_saved_under_our_name(dense_dir, tmp_path):
    """bitsandbytes has one setting per model; such a checkpoint needs inlay, and says so."""
    model = load(dense_dir, overrides={"down_proj": "int8"})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "inlay"
    for again in (inlay.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert_state_equal(again.state_dict(), model.state_dict())
        assert isinstance(again.model.layers[0].mlp.down_proj.storage, Int8)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_golden_checkpoint(kind, tmp_path):
    """Written by transformers + bitsandbytes, loaded and written again without it: same bytes, same answers."""
    out = run(
        f"""
        import inlay, torch
        from safetensors.torch import load_file
        from inlay.bases import QuantizedLinear
        directory = {str(GOLDEN / kind)!r}
        model = inlay.from_pretrained(directory)
        assert type(model).__name__ == 'LlamaForCausalLM'
        assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14
        model.save_pretrained({str(tmp_path)!r})
        wanted = load_file(directory + '/model.safetensors')
        ours = load_file({str(tmp_path / "model.safetensors")!r})
        assert sorted(ours) == sorted(wanted), set(ours) ^ set(wanted)
        for key, tensor in wanted.items():
            assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
        golden = load_file(directory + '/logits.safetensors')
        plain = model.dequantize().float()
        print(float((plain(golden['ids']).logits - golden['logits']).abs().max()))
        model = inlay.tune(inlay.from_pretrained(directory), inlay.LoRA(r=4))
        model.train()(input_ids=golden['ids'], labels=golden['ids']).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        """
    )
    assert float(out) < 1e-5


def test_incomplete_checkpoints_are_named(tmp_path):
    held = load_file(GOLDEN / "nf4/model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / "nf4/config.json").read_text())
    name = "model.layers.1.mlp.up_proj"
    for gone in ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax"):
        save_file(
            {k: v for k, v in held.items() if k != f"{name}.{gone}"}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(ValueError, match=rf"the checkpoint is incomplete: {name} has .* without \['{gone}'\]"):
            inlay.from_pretrained(tmp_path)
    save_file(
        {k: v for k, v in held.items() if not k.startswith(name + ".weight.")},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=rf"incomplete: {name} has \['weight'\] without"):
        inlay.from_pretrained(tmp_path)


def test_conv1d_is_stored_and_comes_back_the_right_way(tmp_path):
    """GPT-2 keeps [in, out]; square ones would come back transposed without an error."""
    dense = BY_NAME["gpt2"].build().eval()
    dense.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert len(quantized(model)) == 8
    attention = model.transformer.h[0].attn.c_proj
    assert_close(attention.weight, dense.transformer.h[0].attn.c_proj.weight.t(), atol=0.2)
    ids = prompt()
    assert_close(model(ids).logits, dense(ids).logits, atol=1.0)
    wanted = model(ids).logits.detach()
    model.save_pretrained(tmp_path / "q")
    assert_equal(inlay.from_pretrained(tmp_path / "q")(ids).logits, wanted)
    plain = model.dequantize()
    assert type(plain.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
    assert_close(plain(ids).logits, wanted, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    assert_close(GPT2LMHeadModel.from_pretrained(tmp_path / "plain")(ids).logits, wanted, atol=1e-4)


def test_dequantize(dense_dir):
    model = load(dense_dir)
    wanted = model(prompt()).logits.detach()
    plain = model.dequantize(torch.float32)
    assert not quantized(plain) and not getattr(plain, "is_quantized", False) and not hasattr(plain, "hf_quantizer")
    assert plain.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    assert max_diff(plain.float()(prompt()).logits, wanted) < 0.1


def test_other_heads(tmp_path):
    BY_NAME["bert"].build().save_pretrained(tmp_path)
    model = load(tmp_path, cls=AutoModelForSequenceClassification)
    assert type(model.classifier) is nn.Linear or isinstance(model.classifier, QuantizedLinear)
    model.save_pretrained(tmp_path / "q")
    again = inlay.from_pretrained(tmp_path / "q")
    assert type(again) is type(model)
    assert_state_equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "copy_it", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(dense_dir, copy_it):
    model = load(dense_dir, double_quant=True)
    other = copy_it(model)
    assert_state_equal(other.state_dict(), model.state_dict())
    assert other.model.layers[0].mlp.up_proj.packed.data_ptr() != model.model.layers[0].mlp.up_proj.packed.data_ptr()
    assert_equal(other(prompt()).logits, model(prompt()).logits)
    inlay.tune(other, inlay.LoRA(r=2))


# --- training ---------------------------------------------------------------------------------------------------------


def trainer_for(model, directory, **options):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        directory, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True, **options
    )
    return Trainer(model, arguments, train_dataset=examples())


def examples(count=8):
    batch = text_batch(0, rows=count)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


@pytest.mark.parametrize("method", [inlay.LoRA(r=4, lora_dropout=0.1), inlay.S2FT(ratio=0.2)], ids=["lora", "s2ft"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(dense_dir, tmp_path, method, checkpointing):
    model = inlay.tune(load(dense_dir, double_quant=True), method)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = trainer_for(model, tmp_path, max_steps=3, bf16=True, gradient_checkpointing=checkpointing)
    assert trainer.train().global_step == 3
    changed = 0
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 or not parameter.requires_grad
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name
        changed += parameter.requires_grad and not torch.equal(parameter, before[name])
    assert changed
    trainer.save_model(tmp_path / "out")
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    again = inlay.load(load(dense_dir, double_quant=True), tmp_path / "out")
    assert_equal(again.eval()(prompt()).logits.float(), model.eval()(prompt()).logits.float())


def test_trainer_resumes_exactly(dense_dir, tmp_path):
    """Its checkpoint holds the trained tensors only; the packed base comes from the model it resumes on."""

    def fresh(folder, steps):
        model = inlay.tune(load(dense_dir), inlay.LoRA(r=4))
        return trainer_for(model, tmp_path / folder, max_steps=steps, save_steps=2, lr_scheduler_type="constant")

    straight, first, second = fresh("one", 4), fresh("two", 2), fresh("two", 4)
    straight.train()
    first.train()
    saved = tmp_path / "two/checkpoint-2"
    assert not any("packed" in key for key in load_file(saved / "model.safetensors"))
    second.train(resume_from_checkpoint=str(saved))
    assert second.state.global_step == 4
    assert_state_equal(second.model.state_dict(), straight.model.state_dict())


def test_sft_trainer(dense_dir, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(3, 97)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    data = Dataset.from_dict({"text": [" ".join(f"w{(i * 7 + j) % 90 + 3}" for j in range(9)) for i in range(8)]})
    model = inlay.tune(load(dense_dir), inlay.LoRA(r=4), fused_loss=False)
    arguments = trl.SFTConfig(
        tmp_path, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False
    )
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    trainable = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(p.dtype == torch.float32 for p in trainable.values())
    trainer.train()
    after = dict(model.named_parameters())
    assert all(after[n].dtype == torch.float32 for n in trainable)
    assert any(not torch.equal(after[n], p) for n, p in trainable.items())


# --- with the library -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"base": "fp4"}, {"base": "int8"}], ids=str)
def test_bitsandbytes_loads_what_we_save(dense_dir, tmp_path, options):
    bnb = pytest.importorskip("bitsandbytes")
    ours = load(dense_dir, **options)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    linear = theirs.model.layers[0].self_attn.q_proj
    assert type(linear) is (bnb.nn.Linear8bitLt if options.get("base") == "int8" else bnb.nn.Linear4bit)
    assert_same_tensors({k: v for k, v in theirs.state_dict().items()}, quantizer.state_dict_as_bitsandbytes(ours))
    if options.get("base") != "int8":
        assert linear.compute_dtype == torch.bfloat16 and linear.weight.quant_state.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_models_of_bitsandbytes_are_tuned_in_place(dense_dir, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(load_in_4bit=True, **four) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config, device_map={"": "cpu"})
    held = {key: value.clone() for key, value in model.state_dict().items()}
    tuned = inlay.tune(model, inlay.LoRA(r=4))
    assert tuned is model and isinstance(model.hf_quantizer, quantizer.Quantizer)
    assert not model.is_loaded_in_4bit if bits == 4 else not model.is_loaded_in_8bit
    assert model.quantization_method == "inlay" and model.is_quantized
    assert not any("bitsandbytes" in type(m).__module__ for m in model.modules())
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if hasattr(module, "deltas"):
            plain.set_submodule(name, module.plain_holder[0])
    assert_same_tensors(quantizer.state_dict_as_bitsandbytes(plain), held)  # no byte was quantized again
    model.train()(**text_batch(0)).loss.backward()


def test_two_bases_cannot_be_mixed_up(dense_dir):
    model = load(dense_dir)
    with pytest.raises(ValueError, match="q_proj: wanted Int8.* but it is quantized as FourBit"):
        inlay.tune(model, inlay.LoRA(r=2), base="int8")
    inlay.tune(model, inlay.LoRA(r=2), base=inlay.BaseConfig("nf4"))  # as it is already
    assert isinstance(model.model.layers[0].mlp.up_proj.storage, FourBit)
