"""Merging on disk: the same weights as merging in memory, shard by shard, and a folder other programs can load."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from comparing import assert_equal
from families import BY_NAME, eval_logits
from methods import shake
from oracle import deltas_of, randomize
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import inlay
from inlay.adapters import merge_files


def saved(name, directory, dtype=torch.float32, update="additive", **options):
    """A base in several shards with a tokenizer's files beside it, and an adapter trained on it."""
    model = BY_NAME[name].build().to(dtype)
    model.save_pretrained(directory / "base", **options)
    (directory / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "base" / "tokenizer.json").write_text("{}")
    (directory / "base" / "pytorch_model.bin").write_bytes(b"stale")
    tuned = inlay.tune(model, inlay.S2FT(ratio=0.3, update=update))
    randomize(tuned, 0.1)
    tuned.save_pretrained(directory / "adapter")
    return tuned


@pytest.mark.parametrize("update", ["additive", "in_place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "opt", "mixtral"])
def test_equals_merging_in_memory(name, dtype, update, tmp_path):
    tuned = saved(name, tmp_path, dtype, update, max_shard_size="20KB")
    shards = sorted(p.name for p in (tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 1
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    kept = {p.name for p in (tmp_path / "base").iterdir()} - {"pytorch_model.bin"}
    assert {p.name for p in (tmp_path / "merged").iterdir()} == kept
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    wanted = inlay.merge(tuned)
    for key, tensor in wanted.state_dict().items():
        assert_equal(loaded.state_dict()[key], tensor, key)
    family = BY_NAME[name]
    before = eval_logits(family.build().to(dtype), family.batch(0))
    assert not torch.equal(eval_logits(loaded, family.batch(0)), before)


OTHERS = {
    "ssf": inlay.SSF(),
    "ia3": inlay.IA3(),
    "lofit": inlay.LoFiT(heads=0.5, strategy="random"),
    "sct": inlay.SCT(strategy="random"),
    "r-adapter": inlay.RAdapter(r=4, ema=0.0),
}


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("size", ["2KB", "1GB"])
def test_biases_and_norms_are_merged_too(method, size, tmp_path):
    """A weight and its bias may stand in different shards."""
    model = BY_NAME["gpt2"].build()
    model.save_pretrained(tmp_path / "base", max_shard_size=size)
    tuned = shake(inlay.tune(model, OTHERS[method]))
    tuned.save_pretrained(tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    changed = 0
    for key, tensor in inlay.merge(tuned).state_dict().items():
        assert_equal(loaded.state_dict()[key], tensor, key)
        changed += not torch.equal(tensor, BY_NAME["gpt2"].build().state_dict()[key])
    assert changed


def test_what_cannot_be_merged_is_refused(tmp_path):
    model = BY_NAME["llama"].build()
    model.save_pretrained(tmp_path / "base")
    shake(inlay.tune(model, OTHERS["lofit"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="o_proj: an offset of heads is merged into the bias"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_a_file_without_a_module_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = BY_NAME["llama"].build()
    model.save_pretrained(tmp_path / "base")
    shake(inlay.tune(model, OTHERS["ssf"])).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if "layers.1.mlp.up_proj" not in key}, path)
    for read in (
        lambda: inlay.load(BY_NAME["llama"].build(), tmp_path / "adapter"),
        lambda: merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"),
    ):
        with pytest.raises(ValueError, match="wanted tensors of model.layers.1.mlp.up_proj.*incomplete"):
            read()


def test_lora_in_one_file(tmp_path):
    model = BY_NAME["llama"].build()
    model.save_pretrained(tmp_path / "base")
    tuned = inlay.tune(model, inlay.LoRA(r=4))
    with torch.no_grad():
        for delta in deltas_of(tuned).values():
            delta.lora_B.normal_(generator=torch.Generator().manual_seed(0))
    tuned.save_pretrained(tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for key, tensor in inlay.merge(tuned).state_dict().items():
        assert_equal(loaded.state_dict()[key], tensor, key)


def test_refusals(tmp_path):
    saved("llama", tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(FileExistsError, match="new or empty folder"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "full")
    other = BY_NAME["llama"].build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not the base the adapter was trained on"):
        merge_files(tmp_path / "other", tmp_path / "adapter", tmp_path / "merged")
    BY_NAME["gpt2"].build().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="the adapter tunes .* lacks"):
        merge_files(tmp_path / "gpt2", tmp_path / "adapter", tmp_path / "merged2")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "inlay"}}))
    with pytest.raises(ValueError, match="is quantized; pass the dense checkpoint"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged3")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "full", "other", "gpt2"}


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_failure_in_a_late_shard_leaves_nothing(there, tmp_path, monkeypatch):
    """Neither a folder that looks merged, nor one beside it; an empty one that was there stays, and can be used."""
    saved("llama", tmp_path, max_shard_size="20KB")
    if there:
        (tmp_path / "merged").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    written = []

    def fails_at_the_third(tensors, path, **options):
        written.append(path)
        if len(written) == 3:
            raise OSError("no space left on device")
        save_file(tensors, path, **options)

    monkeypatch.setattr(sys.modules["inlay.adapters.merge_files"], "save_file", fails_at_the_third)
    with pytest.raises(OSError, match="no space left"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert len(written) == 3 and {path.name for path in tmp_path.iterdir()} == before
    assert not there or not any((tmp_path / "merged").iterdir())
    monkeypatch.undo()
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == before | {"merged"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
