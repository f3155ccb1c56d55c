"""cache_frozen: later epochs start at the first trained block, and nothing of the run changes by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import BY_NAME
from toys import build_model, build_tokenizer

import inlay
from inlay.data import prepare
from inlay.nn.replay import check_replays
from inlay.train import finetune
from inlay.train.frozen_cache import fingerprint_of

WORDS = ["cat", "mat", "hello", "there", "sat", "user", "system", "answer", "the", "on"]
RECORDS = [{"prompt": f"{word}:", "completion": f" {word[::-1]}"} for word in WORDS]
LAYERS = 4
QUICK = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "disable_tqdm": True,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",  # the same batches in each epoch: products of other sizes round otherwise
}


def model_of(method=None, **changes):
    torch.manual_seed(0)
    return inlay.tune(build_model(num_hidden_layers=LAYERS, **changes), method or inlay.FreezeLayers(layers=1))


def counted(model):
    """Tokens that each block's MLP has run on in training."""
    tokens = [0] * LAYERS

    def note(place, own):
        def forward(x):
            tokens[place] += x.shape[:-1].numel() if model.training and x.is_cpu else 0
            return own(x)

        return forward

    for place, block in enumerate(model.model.layers):
        block.mlp.forward = note(place, block.mlp.forward)
    return tokens


def run(folder, model=None, **options):
    model = model_of() if model is None else model
    result = finetune(model, build_tokenizer(), RECORDS, output_dir=str(folder), **(QUICK | options))
    return result, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("padding_free", ["auto", False])
@pytest.mark.parametrize(
    "method", [inlay.FreezeLayers(layers=1), inlay.S2FT(ratio=0.25, target_modules=r".*\.3\..*down_proj")]
)
def test_a_run_is_the_same_bit_for_bit(tmp_path, method, padding_free, capsys):
    options = {"padding_free": padding_free, "eval_data": RECORDS[:3]}
    plain, weights = run(tmp_path / "plain", model_of(method), **options)
    cached, cached_weights = run(tmp_path / "cached", model_of(method), cache_frozen=True, **options)
    assert plain.losses == cached.losses and len(plain.losses) == 9 and plain.eval_losses == cached.eval_losses
    for name, value in weights.items():
        assert torch.equal(cached_weights[name], value), name
    out = capsys.readouterr().out
    tokens = sum(len(sample["input_ids"]) for sample in prepare(RECORDS, build_tokenizer()).samples)
    assert f"above 3 frozen blocks, {tokens * 32 * 4 / 2**20:,.1f} MiB in" in out
    assert "left out for 20 samples of all epochs" in out  # two of three epochs


def test_frozen_blocks_run_in_the_first_epoch_only(tmp_path):
    model = model_of()
    tokens = counted(model)
    run(tmp_path, model, cache_frozen=True, preflight=False)
    assert tokens[0] == tokens[1] == tokens[2] > 0
    assert tokens[3] == 3 * tokens[0]


def test_a_second_run_finds_the_states_and_other_weights_or_data_do_not(tmp_path, capsys):
    first, _ = run(tmp_path, cache_frozen=True)
    again, _ = run(tmp_path, cache_frozen=True)
    assert "10 of 10 samples there already" in capsys.readouterr().out
    assert again.losses == first.losses
    other = model_of()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    run(tmp_path, other, cache_frozen=True)
    assert "there already" not in capsys.readouterr().out
    finetune(model_of(), build_tokenizer(), RECORDS[:9], output_dir=str(tmp_path), cache_frozen=True, **QUICK)
    assert "there already" not in capsys.readouterr().out
    assert json.loads((tmp_path / "_frozen_states.json").read_text())["samples"] == 9


@pytest.mark.parametrize("lost", ["_frozen_states.bin", "_frozen_states_known.bin"])
def test_files_that_are_gone_or_cut_are_made_anew(tmp_path, lost):
    whole, _ = run(tmp_path, cache_frozen=True)
    for damage in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])):
        damage(tmp_path / lost)
        again, _ = run(tmp_path, cache_frozen=True)
        assert again.losses == whole.losses


def test_another_epsilon_of_a_norm_is_another_model(tmp_path):
    run(tmp_path, cache_frozen=True)
    wanted, _ = run(tmp_path / "apart", model_of(rms_norm_eps=0.5), cache_frozen=True)
    found, _ = run(tmp_path, model_of(rms_norm_eps=0.5), cache_frozen=True)
    assert found.losses == wanted.losses


def test_what_trains_is_no_part_of_the_key():
    data = prepare(RECORDS, build_tokenizer())
    model = model_of()
    states = torch.randn(1, 6, 32)
    key = fingerprint_of(model, data, states)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight += 1
    assert fingerprint_of(model, data, states) == key
    assert model.model.norm.weight.requires_grad  # what FreezeLayers trains beside its blocks
    with torch.no_grad():
        model.model.norm.weight += 1
    assert fingerprint_of(model, data, states) == key
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 0] += 1
    assert fingerprint_of(model, data, states) != key
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 0] -= 1
    assert fingerprint_of(model, data, states + 1e-3) != key, "the same weights, computed with otherwise"


def test_shuffled_epochs_train_as_without(tmp_path):
    options = {"train_sampling_strategy": "random"}
    plain, _ = run(tmp_path / "plain", **options)
    cached, _ = run(tmp_path / "cached", cache_frozen=True, **options)
    assert plain.losses == pytest.approx(cached.losses, abs=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(tmp_path, reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain, _ = run(tmp_path / "plain", **options)
    cached, _ = run(tmp_path / "cached", cache_frozen=True, **options)
    assert plain.losses == cached.losses


def test_the_model_is_what_it_was_afterwards(tmp_path):
    model = model_of()
    classes = [type(module) for module in model.modules()]
    run(tmp_path, model, cache_frozen=True)
    assert [type(module) for module in model.modules()] == classes
    assert inlay.load(build_model(num_hidden_layers=LAYERS), str(tmp_path))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (inlay.S2FT(ratio=0.25), {}, "the first block trains"),
        (inlay.LISA(layers=1), {}, "a schedule"),
        (inlay.FreezeLayers(layers=1), {"packing": True}, "packing"),
        (inlay.FreezeLayers(layers=1), {"neftune_noise_alpha": 5.0}, "neftune"),
        (inlay.FreezeLayers(layers=1), {"output_dir": None}, "wants an output_dir"),
    ],
)
def test_what_does_not_go_with_it_is_named(tmp_path, method, options, message):
    options = {"output_dir": str(tmp_path)} | options
    with pytest.raises(ValueError, match=rf"cache_frozen=True.*{message}"):
        finetune(model_of(method), build_tokenizer(), RECORDS, cache_frozen=True, **(QUICK | options))


def test_embeddings_that_train_are_refused(tmp_path):
    model = model_of()
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"cache_frozen=True: something outside the blocks trains before them"):
        run(tmp_path, model, cache_frozen=True)


def test_dropout_in_the_frozen_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cache_frozen=True: .*draw random numbers in training \(dropout\)"):
        run(tmp_path, model_of(attention_dropout=0.1), cache_frozen=True)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2", "opt", "mixtral"])
def test_families_run_from_the_boundary(name):
    model = inlay.tune(BY_NAME[name].build(), inlay.FreezeLayers(layers=1))
    states = check_replays(model, torch.tensor([[5, 6, 7, 8]]))
    assert states.shape == (1, 4, 32)
