"""The adapter directory: what is in it, exact reload, pickling and copying, and what must not be written."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from comparing import assert_equal, assert_state_equal
from families import BY_NAME, FAMILIES, eval_logits, llama, text_batch
from oracle import deltas_of, randomize, train
from safetensors.torch import load_file

import inlay

UPDATES = ["additive", "in_place"]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "model.safetensors"]


def trained(model, update="additive", **options):
    tuned = inlay.tune(model, inlay.S2FT(**({"ratio": 0.2, "update": update} | options)))
    randomize(tuned, 0.1)
    return tuned


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_reload_is_exact(family, update, tmp_path):
    tuned = trained(family.build(), update)
    tuned.save_pretrained(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    loaded = inlay.load(family.build(), tmp_path)
    assert_equal(eval_logits(loaded, family.batch(0)), eval_logits(tuned, family.batch(0)), "logits")
    assert_state_equal(loaded.state_dict(), tuned.state_dict())
    trainable = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in tuned.named_parameters() if p.requires_grad] != []
    assert_state_equal(inlay.merge(loaded).state_dict(), inlay.merge(tuned).state_dict())


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_reload_is_exact_in_other_dtypes(update, dtype, tmp_path):
    tuned = trained(llama().to(dtype), update)
    tuned.save_pretrained(tmp_path)
    loaded = inlay.load(llama().to(dtype), tmp_path)
    assert_equal(eval_logits(loaded, text_batch(0)), eval_logits(tuned, text_batch(0)), "logits")


def test_options_of_any_kind_come_back(tmp_path):
    options = {
        "target_modules": ["o_proj", "down_proj", "up_proj"],
        "ratio": {"o_proj": 0.5, "down_proj": 0.1, "up_proj": 0.2},
        "side": {"up_proj": "in"},
        "granularity": {"down_proj": 2},
        "layers_to_transform": [1],
        "seed": 7,
    }
    tuned = trained(llama(), **options)
    tuned.save_pretrained(tmp_path)
    loaded = inlay.load(llama(), tmp_path)
    assert loaded.inlay_state.methods["default"] == inlay.S2FT(**options)
    assert {delta.side for delta in deltas_of(loaded).values()} == {"in"} and len(deltas_of(loaded)) == 3
    assert_equal(eval_logits(loaded, text_batch(0)), eval_logits(tuned, text_batch(0)), "logits")


def test_indices_are_read_from_the_file_not_drawn_again(tmp_path):
    """The seed in the config is not what the file was made with: only the indices count."""
    tuned = trained(llama(), seed=5)
    tuned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["inlay"]["options"]["seed"] = 123
    config["inlay"]["options"]["ratio"] = 0.9
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = inlay.load(llama(), tmp_path)
    assert_equal(eval_logits(loaded, text_batch(0)), eval_logits(tuned, text_batch(0)), "logits")


@pytest.mark.parametrize("update", UPDATES)
def test_files_are_what_peft_would_write(update, tmp_path):
    from peft import PeftConfig

    tuned = trained(llama(), update)
    tuned.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True)
    assert config["peft_type"] == "S2FT" and config["task_type"] == "CAUSAL_LM" and config["inference_mode"] is True
    assert set(PeftConfig().to_dict()) - {"peft_version"} <= set(config)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = {"s2ft_values", "s2ft_indices"} | ({"s2ft_original"} if update == "in_place" else set())
    assert set(tensors) == {f"base_model.model.{path}.{name}" for path in deltas_of(tuned) for name in names}
    for path, delta in deltas_of(tuned).items():
        assert_equal(tensors[f"base_model.model.{path}.s2ft_values"], delta.s2ft_values.detach(), path)
        assert_equal(tensors[f"base_model.model.{path}.s2ft_indices"], delta.s2ft_indices, path)
    resume = load_file(tmp_path / "model.safetensors")
    assert set(resume) == {key for key in tuned.state_dict() if ".deltas." in key}


def test_a_loaded_adapter_trains_on(tmp_path):
    """Two steps, save, load, two steps, with a stateless optimizer: as four steps in one go."""
    batches = [text_batch(seed) for seed in range(4)]

    def sgd(model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    whole, first = (inlay.tune(llama(), inlay.S2FT(ratio=0.2)) for _ in range(2))
    wanted = train(whole, sgd(whole), batches)
    losses = train(first, sgd(first), batches[:2])
    first.save_pretrained(tmp_path)
    second = inlay.load(llama(), tmp_path).train()
    assert losses + train(second, sgd(second), batches[2:]) == wanted
    assert_state_equal(second.state_dict(), whole.state_dict())


def test_load_frozen(tmp_path):
    trained(llama()).save_pretrained(tmp_path)
    loaded = inlay.load(llama(), tmp_path, trainable=False)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_deepcopy_and_pickle(name, update):
    family = BY_NAME[name]
    tuned = trained(family.build(), update)
    wanted = eval_logits(tuned, family.batch(0))
    buffer = io.BytesIO()
    torch.save(tuned, buffer)
    buffer.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(tuned),
        "pickle": pickle.loads(pickle.dumps(tuned)),
        "torch.save": torch.load(buffer, weights_only=False),
    }
    for how, other in copies.items():
        assert type(other) is type(tuned), how
        assert_equal(eval_logits(other, family.batch(0)), wanted, how)
        optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
        train(other, optimizer, [family.batch(0)])
        assert not torch.equal(eval_logits(other, family.batch(0)), wanted), how
        assert_equal(eval_logits(tuned, family.batch(0)), wanted, f"the original after training its {how}")
        other.disable_adapters()
        assert_state_equal(inlay.merge(other).state_dict(), family.build().state_dict())
        with pytest.raises(RuntimeError, match="lacks trained tensors"):
            other.load_state_dict({}, strict=False)


# --- what must not be written -------------------------------------------------------------------------------


@pytest.mark.parametrize("update", UPDATES)
def test_an_untrained_adapter_is_not_saved(update, tmp_path):
    tuned = inlay.tune(llama(), inlay.S2FT(update=update))
    with pytest.raises(ValueError, match="changes nothing.*train before saving"):
        tuned.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_untrained_checkpoint_is_saved_with_a_warning(tmp_path):
    """Under warm-up the first step's learning rate is 0, and Trainer may save after it."""
    with pytest.warns(UserWarning, match="changes nothing"):
        inlay.tune(llama(), inlay.S2FT(ratio=0.2)).save_pretrained(str(tmp_path / "checkpoint-1"))
    assert sorted(path.name for path in (tmp_path / "checkpoint-1").iterdir()) == FILES


def test_a_partly_untrained_adapter_is_saved_with_a_warning(tmp_path):
    tuned = trained(llama())
    with torch.no_grad():
        next(iter(deltas_of(tuned).values())).s2ft_values.zero_()
    with pytest.warns(UserWarning, match="changes nothing at 1 modules, first model.layers.0"):
        tuned.save_pretrained(tmp_path)
    assert_equal(eval_logits(inlay.load(llama(), tmp_path), text_batch(0)), eval_logits(tuned, text_batch(0)), "logits")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("update", UPDATES)
def test_a_diverged_adapter_is_not_saved(update, value, tmp_path):
    tuned = trained(llama(), update)
    tuned.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        list(deltas_of(tuned).values())[-1].s2ft_values[1, 2] = value
    with pytest.raises(ValueError, match=r"layers\.1.*NaN or infinity"):
        tuned.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_empty_tensor_is_not_saved(tmp_path):
    tuned = trained(llama())
    key = "model.layers.0.mlp.down_proj.deltas.default.s2ft_values"
    with pytest.raises(ValueError, match="is empty: the tensor was sharded away"):
        tuned.save_pretrained(tmp_path, state_dict={key: torch.empty(0)})


def test_values_of_a_given_state_dict_are_written(tmp_path):
    """What Trainer and FSDP hand over, gathered."""
    tuned, other = trained(llama()), trained(llama())
    randomize(other, 0.3, seed=9)
    tuned.save_pretrained(tmp_path, state_dict=other.state_dict())
    loaded = inlay.load(llama(), tmp_path)
    assert_equal(eval_logits(loaded, text_batch(0)), eval_logits(other, text_batch(0)), "logits")


def test_only_the_main_process_writes(tmp_path):
    trained(llama()).save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failing", range(len(FILES)))
def test_a_failed_save_leaves_the_old_adapter(failing, tmp_path, monkeypatch):
    """The disk is full at the n-th file, half of it written: nothing of the old adapter is touched."""
    from inlay.adapters import files

    tuned = trained(llama())
    tuned.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    wanted = eval_logits(tuned, text_batch(0))
    written, write = [], files._write

    def full_disk(path, suffix, content):
        if len(written) == failing:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, suffix, content)

    monkeypatch.setattr(files, "_write", full_disk)
    randomize(tuned, 0.5, seed=3)
    with pytest.raises(OSError, match="No space left"):
        tuned.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_equal(eval_logits(inlay.load(llama(), tmp_path), text_batch(0)), wanted, "logits of the old adapter")


def test_saving_again_replaces_the_adapter(tmp_path):
    tuned = trained(llama())
    tuned.save_pretrained(tmp_path)
    randomize(tuned, 0.5, seed=3)
    tuned.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    loaded = inlay.load(llama(), tmp_path)
    assert_equal(eval_logits(loaded, text_batch(0)), eval_logits(tuned, text_batch(0)), "logits")


def test_pushing_is_refused_aloud(tmp_path):
    tuned = inlay.tune(BY_NAME["llama"].build(), inlay.S2FT(ratio=0.2))
    with pytest.raises(ValueError, match="push_to_hub=True: inlay writes adapters to disk and contacts no service"):
        tuned.save_pretrained(tmp_path, push_to_hub=True)
