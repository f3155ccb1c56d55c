"""Quantized linears as modules: bytes survive everything, errors name what is wrong, gradients are autograd's."""

import copy
import io
import pickle

import pytest
import torch
from comparing import assert_close, assert_equal, assert_series, assert_state_equal
from families import BY_NAME, FAMILIES, cast, eval_logits, llama, prompt, text_batch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn

import inlay
from inlay.bases import BaseConfig, FourBit, Int8, QuantizedLinear, QuantizedWeight, quantize_linears

CONFIGS = {
    "nf4": BaseConfig("nf4"),
    "nf4-nested": BaseConfig("nf4", double_quant=True, blocksize=32),
    "fp4": BaseConfig("fp4", blocksize=128),
    "int8": BaseConfig("int8"),
}
ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make(config, out=48, width=70, dtype=torch.float32, bias=True):
    return QuantizedLinear.of(nn.Linear(width, out, bias=bias, dtype=dtype), config.storage(None, out, width), "l")


def bytes_of(module):
    return {key: value.clone() for key, value in module.state_dict().items() if key != "bias"}


def dequantized(model):
    """The same model with dense weights; made before it is tuned."""
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, QuantizedLinear):
            dense.set_submodule(name, module.to_dense())
    return dense


# --- the module -------------------------------------------------------------------------------------------------------


@ALL
def test_parameters_are_frozen_and_of_their_true_dtype(config):
    module = make(config)
    dtypes = {name: p.dtype for name, p in module.named_parameters() if name != "bias"}
    assert set(dtypes.values()) <= {torch.uint8, torch.int8, torch.float32}
    assert not any(p.requires_grad for name, p in module.named_parameters() if name != "bias")
    assert isinstance(module, nn.Linear) and list(module.buffers()) == []
    assert module.weight.shape == (48, 70) and module.weight.dtype == torch.float32
    assert "in=70, out=48" in repr(module)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_are_those_of_the_dense_weight(config, dtype):
    module = make(config, dtype=dtype)
    dense = module.to_dense()
    for rows in (3, 50):
        x = torch.randn(2, rows, 70, dtype=dtype, requires_grad=True)
        dy = torch.randn(2, rows, 48, dtype=dtype)
        ours, wanted = module(x), dense(x)
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        assert_close(ours, wanted, atol=tolerance)
        got, expected = torch.autograd.grad(ours, x, dy), torch.autograd.grad(wanted, x, dy)
        assert_close(got[0], expected[0], atol=tolerance)


@ALL
def test_casts_change_what_is_computed_but_no_byte(config):
    module = make(config)
    before = bytes_of(module)
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        change(module)
        assert_state_equal(bytes_of(module), before)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        module.to(dtype)
        assert_state_equal(bytes_of(module), before)
        assert module.weight.dtype == module.bias.dtype == module(torch.randn(20, 70, dtype=dtype)).dtype == dtype
        assert all(not p.requires_grad for n, p in module.named_parameters() if n != "bias")
    assert all(t.is_meta for t in module.to("meta").state_dict().values())


@ALL
def test_state_dict_and_copies(config):
    module, other = make(config), make(config)
    x = torch.randn(4, 70)
    wanted = module(x)
    other.load_state_dict(module.state_dict())
    assert_equal(other(x), wanted)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert type(copied) is QuantizedLinear and copied.storage == module.storage
        assert_equal(copied(x), wanted)
        assert copied.tensors[0].data_ptr() != module.tensors[0].data_ptr()
    other.load_state_dict(load_bytes(save_bytes(module.state_dict())))
    assert_equal(other(x), wanted)
    with pytest.raises(RuntimeError, match="size mismatch for"):
        make(config, out=47).load_state_dict(module.state_dict())


def test_another_format_does_not_load():
    """Nested scales into flat ones, or int8 into four bits, must not half succeed."""
    with pytest.raises(RuntimeError, match="Unexpected key|size mismatch|Missing key"):
        make(CONFIGS["nf4"]).load_state_dict(make(CONFIGS["nf4-nested"]).state_dict())
    with pytest.raises(RuntimeError, match="Missing key|Unexpected key"):
        make(CONFIGS["nf4"]).load_state_dict(make(CONFIGS["int8"]).state_dict())


@ALL
def test_autocast(config):
    module = make(config)
    x = torch.randn(30, 70, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    dx = torch.autograd.grad(y.float().sum(), x)[0]
    assert dx.dtype == torch.float32
    assert_close(y, module(x), atol=0.05)


@ALL
def test_training_the_packed_weight_is_refused(config):
    module = make(config)
    with pytest.raises(RuntimeError, match="only Tensors of floating point|floating point"):
        module.tensors[0].requires_grad_(True)
    with pytest.raises(AttributeError, match="this weight is stored quantized .* cannot be assigned"):
        module.weight = nn.Parameter(torch.zeros(48, 70))


@ALL
@pytest.mark.parametrize("dim", [0, 1])
def test_channels_are_taken_out_and_put_back(config, dim):
    """All other codes and every scale keep their bytes; putting the values back restores them."""
    module = make(config, out=33, width=31)  # blocks straddle rows, and an odd number of weights
    before, dense = bytes_of(module), module.weight.clone()
    indices = torch.tensor([0, 5, 6, 30])
    held = dense.index_select(dim, indices)
    module.storage.zero_(dim, indices, *module.tensors)
    zeroed = dense.clone().index_fill_(dim, indices, 0)
    assert_equal(module.weight, zeroed)
    module.storage.write_(dim, indices, held, *module.tensors)
    assert_equal(module.weight, dense)
    if config.base != "fp4":  # which has two codes for zero
        assert_state_equal(bytes_of(module), before)


# --- which linears ----------------------------------------------------------------------------------------------------


def test_choice_of_linears():
    model = llama()
    config = BaseConfig(
        "nf4", skip_modules=["k_proj", "layers.1.mlp.up_proj"], overrides={"o_proj": "int8", "q_proj": None}
    )
    count = quantize_linears(model, config)
    kinds = {n: getattr(m, "storage", None) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, storage in kinds.items():
        if name.endswith(("k_proj", "q_proj", "layers.1.mlp.up_proj")):
            assert storage is None, name
        else:
            assert type(storage) is (Int8 if name.endswith("o_proj") else FourBit), name
    assert count == sum(s is not None for s in kinds.values())
    assert quantize_linears(model, config) == 0  # again: nothing left to do
    model = llama()
    quantize_linears(model, BaseConfig("fp4"))
    assert type(model.lm_head) is nn.Linear


def test_bad_configs():
    for options, message in (
        ({"base": "nf8"}, r"base: wanted one of \['fp4', 'int8', 'nf4'\] or None, got 'nf8'"),
        ({"blocksize": 48}, "blocksize: wanted one of"),
        ({"overrides": {"q_proj": "x"}}, "got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            BaseConfig(**options)
    for config in (BaseConfig(skip_modules=["q_prj"]), BaseConfig(overrides={"q_prj": None})):
        with pytest.raises(ValueError, match="'q_prj', which no linear of this model ends in"):
            quantize_linears(llama(), config)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@ALL
def test_broken_weights_are_named(config, value):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 3] = value
    with pytest.raises(
        ValueError, match=r"model.layers.1.self_attn.v_proj: .*wanted finite values, got NaN or infinity"
    ):
        quantize_linears(model, config)


def test_a_tuned_model_is_not_quantized_under_its_adapter():
    model = inlay.tune(llama(), inlay.S2FT(ratio=0.2))
    before = [n for n, m in model.named_modules() if isinstance(m, QuantizedWeight)]
    with pytest.raises(ValueError, match="is tuned: its base cannot be quantized any more"):
        inlay.tune(model, inlay.LoRA(r=2), base="nf4", adapter_name="second")
    assert before == [n for n, m in model.named_modules() if isinstance(m, QuantizedWeight)] == []


# --- tuned ------------------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "vit"], ids=str)
def test_before_training_only_the_quantization_error_shows(family, config):
    model = family.build()
    quantized = copy.deepcopy(model)
    quantize_linears(quantized, config)
    wanted = eval_logits(dequantized(quantized), family.batch(0))
    tuned = inlay.tune(model, inlay.LoRA(r=2), base=config)
    assert_close(eval_logits(tuned, family.batch(0)), wanted, atol=2e-4)


METHODS = {
    "lora": inlay.LoRA(r=3, lora_alpha=4),
    "s2ft": inlay.S2FT(ratio=0.2),
    "s2ft-out": inlay.S2FT(ratio=0.2, target_modules=["q_proj", "up_proj"], granularity=1),
}


@ALL
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_gradients_are_autograds_through_the_dequantized_weight(method, config):
    """The same deltas on the same weights, dense: losses and gradients agree, five AdamW steps long."""
    quantized = llama()
    quantize_linears(quantized, config)
    dense = dequantized(quantized)
    ours, wanted = inlay.tune(quantized, method), inlay.tune(dense, method, fused_blocks=False, fused_loss=False)
    trainables = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (ours, wanted)]
    assert trainables[0].keys() == trainables[1].keys()
    losses = []
    for model, parameters in zip((ours, wanted), trainables, strict=True):
        optimizer, series = torch.optim.AdamW(parameters.values(), lr=3e-3), []
        for seed in range(5):
            optimizer.zero_grad()
            loss = model(**text_batch(seed)).loss
            loss.backward()
            if seed == 0:
                first = {n: p.grad.clone() for n, p in parameters.items()}
            optimizer.step()
            series.append(loss.item())
        losses.append((series, first))
    assert_series(losses[0][0], losses[1][0], rtol=1e-5)
    for name, gradient in losses[1][1].items():
        assert_close(losses[0][1][name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-8, what=name)
    for name, parameter in trainables[1].items():
        assert_close(trainables[0][name], parameter, atol=2e-4, what=name)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_resume_is_exact(method, tmp_path):
    def fresh():
        model = inlay.tune(llama(), method, base="nf4")
        return model, inlay.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def step(model, optimizer, seed):
        optimizer.zero_grad()
        loss = model(**text_batch(seed)).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    model, optimizer = fresh()
    losses = [step(model, optimizer, seed) for seed in range(6)]
    model, optimizer = fresh()
    again = [step(model, optimizer, seed) for seed in range(3)]
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    model, optimizer = fresh()
    state = torch.load(tmp_path / "state")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    again += [step(model, optimizer, seed) for seed in range(3, 6)]
    assert again == losses


@ALL
def test_disabled_gives_the_quantized_base(config):
    base = llama()
    quantize_linears(base, config)
    wanted = eval_logits(base, text_batch(0))
    for method in (inlay.LoRA(r=4), inlay.S2FT(ratio=0.3), inlay.S2FT(ratio=0.3, keep="exact")):
        model = inlay.tune(copy.deepcopy(base), method)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        assert not torch.allclose(eval_logits(model, text_batch(0)), wanted, atol=1e-2)
        with inlay.disabled(model):
            assert_close(eval_logits(model, text_batch(0)), wanted, atol=1e-5)


# --- channels kept exact ----------------------------------------------------------------------------------------------

EXACT = inlay.S2FT(ratio=0.3, keep="exact")


@ALL
def test_exact_channels_have_no_quantization_error(config):
    dense = llama()
    model = inlay.tune(copy.deepcopy(dense), EXACT, base=config)
    quantized = copy.deepcopy(dense)
    quantize_linears(quantized, config)
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        tuned = model.get_submodule(name)
        delta = tuned.deltas["default"]
        effective, _ = tuned.merged_onto()
        chosen = torch.zeros(tuned.in_features, dtype=torch.bool)
        chosen[delta.s2ft_indices] = True
        assert_equal(effective[:, chosen], dense.get_submodule(name).weight[:, chosen])
        assert_equal(effective[:, ~chosen], quantized.get_submodule(name).weight[:, ~chosen])
        assert_equal(tuned.weight, quantized.get_submodule(name).weight)  # what the base is without the adapter
        x = torch.randn(20, tuned.in_features)
        assert_close(tuned(x), x @ effective.t(), atol=1e-4)


def test_exact_trains_saves_and_loads(tmp_path):
    model = inlay.tune(llama(), EXACT, base="nf4")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(3):
        optimizer.zero_grad()
        model(**text_batch(seed)).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    wanted = eval_logits(model, text_batch(9))
    again = inlay.load(llama(), tmp_path, base="nf4")
    assert_equal(eval_logits(again, text_batch(9)), wanted)
    packed = llama()
    quantize_linears(packed, BaseConfig("nf4"))
    assert_equal(eval_logits(inlay.load(packed, tmp_path), text_batch(9)), wanted)
    with pytest.raises(ValueError, match='keep="exact" is for quantized bases, and this one is dense'):
        inlay.load(llama(), tmp_path)


def test_deleting_an_exact_adapter_restores_the_base():
    base = llama()
    quantize_linears(base, BaseConfig("nf4", double_quant=True))
    before = {key: value.clone() for key, value in base.state_dict().items()}
    wanted = eval_logits(base, text_batch(0))
    model = inlay.tune(base, EXACT)
    others = [n for n in ("q_proj", "up_proj")]
    inlay.tune(model, inlay.LoRA(r=2, target_modules=others), adapter_name="second")
    model.set_adapter("second")
    model.delete_adapter("default")
    assert_close(eval_logits(model, text_batch(0)), wanted, atol=1e-5)
    for key, tensor in before.items():
        assert_equal(model.state_dict()[key], tensor, key)


@pytest.mark.parametrize("options", [{"update": "in_place"}, {"keep": "exact"}], ids=str)
def test_forms_that_need_the_other_kind_of_base(options):
    """Refused before anything changes."""
    model = llama()
    base = "nf4" if "update" in options else None
    message = 'update="in_place" writes into a dense weight' if base else 'keep="exact" is for quantized bases'
    with pytest.raises(ValueError, match=message):
        inlay.tune(model, inlay.S2FT(ratio=0.2, **options), base=base)
    assert not any(isinstance(m, QuantizedWeight) or hasattr(m, "deltas") for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    if base:
        quantize_linears(model, BaseConfig())
        with pytest.raises(ValueError, match=message):
            inlay.tune(model, inlay.S2FT(ratio=0.2, **options))


def test_generation_with_an_adapter():
    model = inlay.tune(llama(), inlay.LoRA(r=2), base="nf4").eval()
    ids = prompt()
    out = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    family = BY_NAME["llama"]
    model = inlay.tune(family.build().to(dtype), inlay.LoRA(r=4), base="nf4")
    model(**cast(family.batch(0), dtype)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32 and bool(
                torch.isfinite(parameter.grad).all()
            ), name


def test_micro_batches_equal_one_batch():
    def gradients(pieces):
        model = inlay.tune(llama(), inlay.LoRA(r=4), base="nf4")
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n.endswith("lora_B"):
                    p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        batch = text_batch(0, rows=4)
        total = int((batch["labels"][:, 1:] != -100).sum())
        for i in range(pieces):
            part = {k: v.chunk(pieces)[i] for k, v in batch.items()}
            model(**part, num_items_in_batch=total).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    one, four = gradients(1), gradients(4)
    for name, gradient in one.items():
        assert_close(four[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-9, what=name)
