"""S²FT as a method of PEFT's own: the same numbers as inlay.tune, under PEFT's functions and files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from comparing import assert_close, assert_equal, assert_series
from families import BY_NAME, eval_logits, llama, text_batch
from oracle import deltas_of
from safetensors.torch import load_file, save_file

import inlay

peft = pytest.importorskip("peft")
pytest.importorskip("inlay.integrations.peft")
from peft import PeftModel, get_peft_model  # noqa: E402
from peft_models import deep_llama, layers_of, randomize, train, trained, wrapped  # noqa: E402

from inlay.integrations.peft import S2FTConfig  # noqa: E402

STEPS = 4
LEAVES = ("s2ft_values", "s2ft_indices")


# --- the same as inlay.tune -----------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert", "t5", "mixtral"])
def test_equals_tune(name, fused):
    """The default targets of each family, the same channels, losses and weights."""
    family = BY_NAME[name]
    ours = inlay.tune(family.build(), inlay.S2FT(ratio=0.2, seed=5), fused_blocks=fused)
    head = ours.inlay_state.methods["default"].modules_to_save
    theirs = wrapped(family.build(), seed=5, fused_blocks=fused, modules_to_save=head)
    batches = [family.batch(seed) for seed in range(STEPS)]
    losses = [train(model, batches) for model in (ours, theirs)]
    assert_series(losses[1], losses[0], rtol=2e-5, what="losses")
    assert len(set(losses[0])) == STEPS
    layers = layers_of(theirs)
    assert set(layers) == set(deltas_of(ours)) and len(layers) == family.targets
    for path, delta in deltas_of(ours).items():
        assert_equal(layers[path].s2ft_indices["default"], delta.s2ft_indices, path)
        assert_close(layers[path].s2ft_values["default"], delta.s2ft_values, atol=1e-4, what=path)
        assert bool(delta.s2ft_values.any())
    merged = inlay.merge(ours).state_dict()
    for key, tensor in theirs.merge_and_unload().state_dict().items():
        assert_close(tensor, merged[key], atol=1e-4, what=key)


@pytest.mark.parametrize("options", [{"side": "out"}, {"target_modules": "all-linear"}, {"channels": 8}])
def test_options_mean_the_same(options):
    options = options if "channels" in options else {"ratio": 0.3, **options}
    ours = inlay.tune(llama(), inlay.S2FT(**options))
    theirs = get_peft_model(llama(), S2FTConfig(**options))
    assert set(layers_of(theirs)) == set(deltas_of(ours))
    for path, delta in deltas_of(ours).items():
        assert_equal(layers_of(theirs)[path].s2ft_indices["default"], delta.s2ft_indices, path)
        assert layers_of(theirs)[path].s2ft_deltas["default"].side == delta.side


def test_targets_are_peft_s():
    """Lists, expressions, exclusions and layers as PEFT's matching reads them."""
    for options, wanted in (
        ({"target_modules": ["down_proj"], "layers_to_transform": [1]}, {"model.layers.1.mlp.down_proj"}),
        ({"target_modules": r".*\.0\..*o_proj"}, {"model.layers.0.self_attn.o_proj"}),
        ({"layers_to_transform": 2, "exclude_modules": ["o_proj"]}, {"model.layers.2.mlp.down_proj"}),
    ):
        assert set(layers_of(wrapped(deep_llama(), **options))) == wanted


def test_adapters_start_at_the_base_and_train_alone():
    base, model = llama(), wrapped(fused_blocks=False)
    assert_equal(eval_logits(model, text_batch(0)), eval_logits(base, text_batch(0)), "logits")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all(".s2ft_values.default" in name for name in names)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("cast", [True, False])
def test_values_are_fp32_on_a_bf16_base(cast):
    model = get_peft_model(llama().to(torch.bfloat16), S2FTConfig(ratio=0.2), autocast_adapter_dtype=cast)
    assert {layer.s2ft_values["default"].dtype for layer in layers_of(model).values()} == {torch.float32}
    losses = train(model, [text_batch(0)] * 8)
    assert losses[-1] < losses[0]


# --- files ----------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.{path}.{leaf}" for path in layers_of(model) for leaf in LEAVES}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "S2FT"
    wanted = eval_logits(model, text_batch(7))
    for options in ({}, {"is_trainable": True}, {"adapter_name": "other"}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, **options)
        atol = 1e-5 if "low_cpu_mem_usage" in options else 0  # blocks are not fused there
        assert_close(eval_logits(loaded, text_batch(7)), wanted, atol=atol, what=str(options))
        assert any(p.requires_grad for p in loaded.parameters()) == ("is_trainable" in options)
    assert peft.PeftConfig.from_pretrained(tmp_path).method.ratio == 0.2


def test_stored_channels_win_over_chosen_ones(tmp_path):
    """A file whose channels are not what its options would choose again."""
    model = trained()
    with torch.no_grad():
        for layer in layers_of(model).values():
            indices = layer.s2ft_indices["default"]
            channels = layer.in_features if layer.s2ft_deltas["default"].side == "in" else layer.out_features
            rest = [c for c in range(channels) if c not in indices.tolist()]
            indices.copy_(torch.tensor(rest[: len(indices)]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert_equal(eval_logits(loaded, text_batch(7)), eval_logits(model, text_batch(7)), "logits")


def test_inlay_loads_what_peft_saved_on_the_same_base_only(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    loaded = inlay.load(llama(), tmp_path)
    assert_close(eval_logits(loaded, text_batch(7)), eval_logits(model, text_batch(7)), atol=1e-6)
    another = llama()
    for parameter in another.parameters():
        parameter.data.neg_()
    for load in (inlay.load, PeftModel.from_pretrained):
        with pytest.raises(ValueError, match="not the base"):
            load(another, tmp_path)
    config = S2FTConfig.from_pretrained(tmp_path)
    config.inlay["base_sample"].clear()
    PeftModel.from_pretrained(another, tmp_path, config=config)


def change(tensors, kind):
    """Tensors of one layer, changed in a way."""
    values, indices = (next(t for key, t in tensors.items() if key.endswith(leaf)) for leaf in LEAVES)
    if kind == "other order":
        order = torch.arange(len(indices)).flip(0)
        dim = 1 if values.shape[1] == len(indices) else 0
        values.copy_(values.index_select(dim, order)), indices.copy_(indices[order])
    elif kind == "NaN":
        values[0, 0] = float("nan")
    elif kind == "incomplete":
        del tensors[next(key for key in tensors if key.endswith("s2ft_indices"))]
    else:
        indices[-1] = 10**6 if kind == "out of range" else indices[0]


@pytest.mark.parametrize(
    "kind, message",
    [
        ("other order", None),
        ("out of range", r"wanted channels in \[0, "),
        ("repeated", "repeated"),
        ("NaN", "NaN or infinity"),
        ("incomplete", "the file is incomplete"),
    ],
)
def test_a_file_is_checked_before_it_is_used(kind, message, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors, kind)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if message is None:
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
        assert_equal(eval_logits(loaded, text_batch(7)), eval_logits(model, text_batch(7)), "logits")
    else:
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.filterwarnings("error::UserWarning")  # of unexpected keys, which PEFT would ignore
def test_peft_loads_what_inlay_saved(tmp_path):
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2, seed=3))
    train(tuned, [text_batch(0)])
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert_close(eval_logits(loaded, text_batch(7)), eval_logits(tuned, text_batch(7)), atol=1e-6)


def test_forms_that_change_the_base_are_refused(tmp_path):
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2, update="in_place"))
    train(tuned, [text_batch(0)])
    tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="update: wanted 'additive', got 'in_place'"):
        PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(ValueError, match="keep: wanted 'additive'"):
        S2FTConfig(keep="exact")
    with pytest.raises(ValueError, match="ratio: wanted a fraction"):
        S2FTConfig(ratio=3)


# --- PEFT's functions -----------------------------------------------------------------------------------


def test_disable_adapter_is_the_base():
    model = trained(fused_blocks=False)
    tuned, base = eval_logits(model, text_batch(0)), eval_logits(llama(), text_batch(0))
    assert not torch.allclose(tuned, base)
    with model.disable_adapter():
        assert_equal(eval_logits(model, text_batch(0)), base, "disabled")
    assert_equal(eval_logits(model, text_batch(0)), tuned, "enabled again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unmerge_restores_the_very_bits(name, dtype):
    family = BY_NAME[name]
    base = family.build().to(dtype)
    model = wrapped(copy.deepcopy(base))
    randomize(model)
    apart = eval_logits(model, family.batch(0))
    model.merge_adapter(safe_merge=True)
    atol = 1e-5 if dtype == torch.float32 else 0.1
    assert_close(eval_logits(model, family.batch(0)).float(), apart.float(), atol=atol)
    model.unmerge_adapter()
    assert_equal(eval_logits(model, family.batch(0)), apart, "unmerged")
    plain = model.unload().state_dict()
    for key, tensor in base.state_dict().items():
        assert_equal(plain[key], tensor, key)


def test_unloading_leaves_nothing_behind():
    model = trained(deep_llama(), layers_to_transform=[2])
    plain = model.merge_and_unload()
    fresh = deep_llama()
    assert [type(m) for m in plain.modules()] == [type(m) for m in fresh.modules()]
    assert not plain._forward_pre_hooks
    assert list(plain.state_dict()) == list(fresh.state_dict())


def test_a_broken_adapter_is_not_merged_safely():
    model = wrapped()
    next(iter(layers_of(model).values())).s2ft_values["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)


def test_several_adapters(tmp_path):
    one, other = trained(), trained(llama(), 50, target_modules=["gate_proj", "down_proj"], seed=9)
    one.save_pretrained(tmp_path / "one"), other.save_pretrained(tmp_path / "other")
    wanted = {"one": eval_logits(one, text_batch(7)), "other": eval_logits(other, text_batch(7))}
    assert not torch.allclose(*wanted.values())

    model = PeftModel.from_pretrained(llama(), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "other", adapter_name="other")
    for name in ("other", "one", "other"):
        model.set_adapter(name)
        assert_equal(eval_logits(model, text_batch(7)), wanted[name], name)
        assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {name}
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(llama(), tmp_path / "both" / "one")
    assert_equal(eval_logits(again, text_batch(7)), wanted["one"], "saved among others")
    model.delete_adapter("other")
    model.set_adapter("one")
    assert_equal(eval_logits(model, text_batch(7)), wanted["one"], "after deleting the other")
    with pytest.raises(ValueError):
        model.set_adapter("other")


def test_two_adapters_at_once_add_up():
    model = trained()
    model.add_adapter("second", S2FTConfig(ratio=0.4, seed=2))
    randomize(model, "second")
    model.base_model.set_adapter(["default", "second"])
    both = eval_logits(model, text_batch(0))
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(eval_logits(merged, text_batch(0)), both, atol=2e-5)
    model.set_adapter("second")
    assert not torch.allclose(eval_logits(model, text_batch(0)), both)


def test_an_added_adapter_trains_only_once_it_is_active():
    model = wrapped()
    model.add_adapter("second", S2FTConfig(ratio=0.2, seed=2, target_modules=["q_proj", "o_proj"]))
    assert all(".default" in n for n, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("second")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".default" in n}
    train(model, [text_batch(0)])
    assert all(
        layer.s2ft_values["second"].any() for layer in layers_of(model).values() if "second" in layer.s2ft_values
    )
    assert all(torch.equal(model.get_parameter(n), value) for n, value in before.items())


def test_a_copy_is_another_model():
    model = trained()
    wanted = eval_logits(model, text_batch(0))
    copied = copy.deepcopy(model)
    randomize(copied)
    assert_equal(eval_logits(model, text_batch(0)), wanted, "original")
    assert not torch.allclose(eval_logits(copied, text_batch(0)), wanted)


def test_mixed_batches_are_refused():
    model = wrapped()
    model.add_adapter("second", S2FTConfig(ratio=0.2))
    with pytest.raises(NotImplementedError, match="one adapter for a whole batch"):
        model(**text_batch(0), adapter_names=["default", "second", "default"])


def test_modules_to_save_train_and_are_saved(tmp_path):
    model = trained(modules_to_save=["lm_head"])
    assert not torch.equal(model.get_base_model().lm_head.weight, llama().lm_head.weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert_equal(eval_logits(loaded, text_batch(7)), eval_logits(model, text_batch(7)), "logits")


def test_conversion_to_lora_by_peft_is_exact():
    """ΔW has the rank of the number of channels: nothing is lost at that rank."""
    model = wrapped(channels=8, target_modules=["down_proj"])
    randomize(model)
    config, tensors = peft.convert_to_lora(model, rank=8)
    lora = get_peft_model(llama(), config)
    peft.set_peft_model_state_dict(lora, tensors)
    assert_close(eval_logits(lora, text_batch(0)), eval_logits(model, text_batch(0)), atol=1e-4)


def skip_unless_paired():
    """A release of transformers may want a PEFT newer than the one that is installed, or than any there is."""
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as reason:
        pytest.skip(f"transformers {transformers.__version__}: {reason}")


def test_transformers_own_adapter_functions():
    """``model.add_adapter`` puts the layers on the model itself, without PEFT's wrapper."""
    skip_unless_paired()
    model = llama()
    model.add_adapter(S2FTConfig(ratio=0.2))
    losses = train(model, [text_batch(0)] * 6)
    assert losses[-1] < losses[0]
    ours = inlay.tune(llama(), inlay.S2FT(ratio=0.2))
    assert_series(losses, train(ours, [text_batch(0)] * 6), rtol=2e-5)
