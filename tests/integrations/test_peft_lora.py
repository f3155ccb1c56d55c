"""A stock LoraConfig on inlay's ops: stock PEFT's numbers and files, and its own layers where the op cannot do it."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import assert_close, assert_equal, assert_series, assert_state_equal
from families import BY_NAME, eval_logits, llama, text_batch
from safetensors.torch import load_file
from torch import nn

import inlay
from inlay.bases import BaseConfig, QuantizedLinear, quantize_linears
from inlay.nn.blocks import install_blocks

peft = pytest.importorskip("peft")
lora = pytest.importorskip("inlay.integrations.peft.lora")
from inlay.integrations.peft import accelerate_lora, fuse_blocks  # noqa: E402

STEPS = 4
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def wrapped(model, accelerate=True, **options):
    """Under PEFT, from the same random numbers either way."""
    torch.manual_seed(11)
    config = peft.LoraConfig(**(PLAIN | options))
    return peft.get_peft_model(model, accelerate_lora(config) if accelerate else config)


@pytest.fixture
def ops(monkeypatch):
    """Counts the calls of the fused ops."""
    calls = []
    for name in ("lora_linear", "swiglu_lora_linear"):
        run = getattr(lora, name)
        monkeypatch.setattr(lora, name, lambda *args, run=run, **kwargs: calls.append(1) or run(*args, **kwargs))
    return calls


def train(model, batches, rate=5e-3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.1)
    losses = []
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)  # dropout
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trainables(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def compare(family, tolerance=2e-5, **options):
    """The same initial values, losses and final values; returns the accelerated model."""
    ours, stock = wrapped(family.build(), **options), wrapped(family.build(), accelerate=False, **options)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert_state_equal(trainables(ours), trainables(stock))
    batches = [family.batch(seed) for seed in range(STEPS)]
    losses = [train(model, batches) for model in (ours, stock)]
    assert len(set(losses[1])) == STEPS
    assert_series(losses[0], losses[1], rtol=tolerance, what="losses")
    for name, parameter in trainables(stock).items():
        assert_close(ours.get_parameter(name), parameter, atol=5 * tolerance, what=name)
    return ours


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_equals_stock_peft(name, ops):
    family = BY_NAME[name]
    model = compare(family)
    layers = [m for m in model.modules() if isinstance(m, lora.FusedLoraLinear)]
    assert len(ops) >= STEPS * (len(layers) - 2) > 0  # every layer, at every step (T5 has two that no batch reaches)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 8, "lora_alpha": 3, "use_rslora": True},
        {"lora_dropout": 0.3},
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 16}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"]},
    ],
    ids=lambda options: next(iter(options)) + str(next(iter(options.values()))),
)
def test_options_with_the_op(options, ops):
    compare(BY_NAME["llama"], **options)
    assert ops


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}],
    ids=lambda o: next(iter(o)),
)
def test_what_the_op_cannot_do_is_peft_s_own(options, ops):
    """qwen2 has biases on q, k and v alone: with bias="lora_only" the other linears still run the op."""
    with pytest.warns(UserWarning, match=f"accelerate_lora: {next(iter(options))}"):
        compare(BY_NAME["qwen2"], target_modules=["q_proj", "v_proj"], **options)
    assert not ops


def test_several_active_adapters_and_mixed_batches():
    pair = [wrapped(llama(), accelerate) for accelerate in (True, False)]
    for model in pair:
        torch.manual_seed(5)
        model.add_adapter(
            "second", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
        model.base_model.set_adapter(["default", "second"])
    assert_equal(eval_logits(pair[0], text_batch(0)), eval_logits(pair[1], text_batch(0)), "both")
    for model in pair:
        model.set_adapter("second")
    assert_close(eval_logits(pair[0], text_batch(0)), eval_logits(pair[1], text_batch(0)), atol=1e-5)
    names = {"adapter_names": ["default", "__base__", "second"]}
    mixed = [eval_logits(model, text_batch(0) | names) for model in pair]
    assert_close(mixed[0], mixed[1], atol=1e-6)


def test_merged_and_disabled(ops):
    model = wrapped(llama(), init_lora_weights=False)
    apart = eval_logits(model, text_batch(0))
    count = len(ops)
    with model.disable_adapter():
        assert_equal(eval_logits(model, text_batch(0)), eval_logits(llama(), text_batch(0)), "disabled")
    model.merge_adapter()
    assert_close(eval_logits(model, text_batch(0)), apart, atol=1e-4)
    assert len(ops) == count > 0
    stock = wrapped(llama(), accelerate=False, init_lora_weights=False).merge_and_unload()
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in stock.modules()]
    for key, tensor in stock.state_dict().items():
        assert_close(plain.state_dict()[key], tensor, atol=1e-6, what=key)


def test_the_files_are_plain_lora(tmp_path):
    ours, stock = wrapped(llama(), init_lora_weights=False), wrapped(llama(), False, init_lora_weights=False)
    ours.save_pretrained(tmp_path / "ours"), stock.save_pretrained(tmp_path / "stock")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock")]
    assert_state_equal(*[dict(sorted(tensors.items())) for tensors in files])
    configs = [peft.PeftConfig.from_pretrained(tmp_path / name).to_dict() for name in ("ours", "stock")]
    assert configs[0] == configs[1] and configs[0]["peft_type"] == "LORA"
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert not any(isinstance(module, lora.FusedLoraLinear) for module in loaded.modules())
    assert_close(eval_logits(loaded, text_batch(0)), eval_logits(ours, text_batch(0)), atol=1e-5)
    config = accelerate_lora(peft.LoraConfig.from_pretrained(tmp_path / "ours"))
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours", config=config)
    assert sum(isinstance(module, lora.FusedLoraLinear) for module in again.modules()) == 14
    assert_equal(eval_logits(again, text_batch(0)), eval_logits(ours, text_batch(0)), "loaded, accelerated")


# --- with fused blocks ----------------------------------------------------------------------------------


def test_with_fused_blocks(ops):
    """The MLP's product is rebuilt: the numbers stay, the op of the down projection is the other one."""
    family = BY_NAME["llama"]
    ours, stock = wrapped(fuse_blocks(family.build())), wrapped(family.build(), accelerate=False)
    batches = [family.batch(seed) for seed in range(STEPS)]
    assert_series(train(ours, batches), train(stock, batches), rtol=2e-5)
    for name, parameter in trainables(stock).items():
        assert_close(ours.get_parameter(name), parameter, atol=1e-4, what=name)
    assert len(ops) == STEPS * 14
    assert not install_blocks(ours), "everything was fused before"


# --- quantized bases ------------------------------------------------------------------------------------


def quantized(base="nf4"):
    model = llama().requires_grad_(False)
    quantize_linears(model, BaseConfig(base))
    return model


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_on_a_quantized_base(base, tmp_path, ops):
    """QLoRA: inlay.tune's losses from the same A."""
    model = wrapped(quantized(base))
    ours = inlay.tune(llama(), inlay.LoRA(r=4, lora_alpha=8), base=base)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, lora.FusedQuantizedLoraLinear):
            factor = ours.get_submodule(name).deltas["default"].lora_A
            factor.data.copy_(module.lora_A["default"].weight)
    batches = [text_batch(seed) for seed in range(STEPS)]
    assert_series(train(model, batches), train(ours, batches), rtol=2e-5)
    assert len(ops) == STEPS * 14
    wanted = eval_logits(model, text_batch(7))
    model.save_pretrained(tmp_path)
    config = accelerate_lora(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(quantized(base), tmp_path, config=config)
    assert_equal(eval_logits(loaded, text_batch(7)), wanted, "loaded")
    unloaded = copy.deepcopy(model).unload()
    assert_equal(eval_logits(unloaded, text_batch(7)), eval_logits(quantized(base), text_batch(7)), "unloaded")
    with pytest.raises(ValueError, match="rounded away"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="quantization error"):
        merged = model.merge_and_unload()
    assert not any(isinstance(module, QuantizedLinear) for module in merged.modules())
    assert_close(eval_logits(merged, text_batch(7)), wanted, atol=1e-4)


@pytest.mark.filterwarnings("ignore:accelerate_lora")
@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"bias": "all"}], ids=lambda o: next(iter(o)))
def test_options_that_write_into_a_quantized_base_are_refused(options):
    """PEFT would write into a copy of the weight, or train a bias that gets no gradient, and nobody would know."""
    with pytest.raises(ValueError, match="leaves a quantized base as it is"):
        wrapped(quantized(), **options)
    model = wrapped(quantized())
    with pytest.raises(ValueError, match="leaves a quantized base as it is"):
        model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], **options))


# --- where the op stands back ---------------------------------------------------------------------------


def test_hooks_on_the_base_run(ops):
    model = wrapped(llama(), target_modules=["q_proj"])
    seen = []
    for layer in model.get_base_model().model.layers:
        layer.self_attn.q_proj.base_layer.register_forward_hook(lambda *_: seen.append(1))
    model(**text_batch(0))
    assert len(seen) == 2 and not ops


def test_a_base_weight_that_trains_gets_its_gradient(ops):
    model = wrapped(llama(), target_modules=["q_proj"])
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    model(**text_batch(0)).loss.backward()
    assert bool(weight.grad.any()) and len(ops) == 1


def test_factors_of_another_dtype_run_peft_s_forward(ops):
    torch.manual_seed(0)
    config = accelerate_lora(peft.LoraConfig(**PLAIN))
    model = peft.get_peft_model(llama().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    model(**text_batch(0)).loss.backward()
    assert not ops and trainables(model)


def test_autocast_trains_in_fp32(ops):
    model = wrapped(llama())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = train(model, [text_batch(0)] * 6)
    assert losses[-1] < losses[0] and ops
    assert {p.dtype for p in trainables(model).values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, ops):
    plain, recomputed = wrapped(llama()), wrapped(llama())
    recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    recomputed.enable_input_require_grads()
    batches = [text_batch(seed) for seed in range(2)]
    wanted, count = train(plain, batches), len(ops)
    assert_series(train(recomputed, batches), wanted, rtol=1e-5)
    assert len(ops) == 3 * count  # forward, and again in the backward
    for name, parameter in trainables(plain).items():
        assert_close(recomputed.get_parameter(name), parameter, atol=1e-5, what=name)


def test_compiles_without_a_graph_break():
    model = wrapped(llama(), init_lora_weights=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(**text_batch(0)).loss, model(**text_batch(0)).loss, atol=1e-6)


def test_other_libraries_linears_are_left_to_peft():
    class OtherLinear(nn.Linear):
        """As other quantization libraries' are: a subclass whose forward reads something else."""

    assert lora.make_layer(OtherLinear(4, 4), "default", peft.LoraConfig()) is None


def test_what_is_no_lora_config_is_refused():
    with pytest.raises(TypeError, match="wanted a peft.LoraConfig, got AdaLoraConfig"):
        accelerate_lora(peft.AdaLoraConfig(total_step=10))
    with pytest.raises(ValueError, match="tuned by inlay.tune already"):
        wrapped(inlay.tune(llama(), inlay.S2FT()), target_modules=["down_proj"])
