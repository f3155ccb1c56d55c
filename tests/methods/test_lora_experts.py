"""LoRA on experts: the numbers and the files of PEFT's target_parameters, both ways, on every layout."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from comparing import assert_close, assert_equal
from families import _LLAMA, eval_logits, perturb, text_batch

import inlay
from inlay.nn.blocks import install_blocks
from inlay.nn.experts import TunedExperts

_MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
FAMILIES = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": _MOE | {"num_experts": 5, "head_dim": 8, "decoder_sparse_step": 1},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    "Llama4Text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "intermediate_size_mlp": 24,
        "interleave_moe_layer_step": 1,
        "attn_temperature_tuning": False,
    },
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
BATCH = text_batch(0)
every_family = pytest.mark.parametrize("kind", FAMILIES)


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(_LLAMA | FAMILIES[kind]))
    name = "Llama4ForCausalLM" if kind == "Llama4Text" else f"{kind}ForCausalLM"
    return perturb(getattr(transformers, name)(config))


def randomized(model: torch.nn.Module, size: float = 0.1) -> torch.nn.Module:
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(size * torch.randn(parameter.shape, generator=random))
    return model


def tuned_on(kind: str, names: list[str] = BOTH, **options) -> torch.nn.Module:
    options = {"r": 3, "lora_alpha": 6, "target_modules": []} | options
    return inlay.tune(build(kind), inlay.LoRA(target_parameters=names, **options))


def close(ours, wanted, what):
    assert_close(ours, wanted, atol=2e-5 * float(wanted.abs().max()), what=what)


CHOICES = [BOTH, BOTH[:1], BOTH[1:]]


@pytest.mark.parametrize("names", CHOICES, ids=["both", "up", "down"])
@every_family
def test_what_is_saved_is_the_same_in_peft(kind, names, tmp_path):
    tuned = randomized(tuned_on(kind, names))
    wanted = eval_logits(tuned, BATCH)
    assert float((wanted - eval_logits(build(kind), BATCH)).abs().max()) > 1e-2
    tuned.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(kind), tmp_path)
    close(eval_logits(theirs, BATCH), wanted, "PEFT's logits")
    close(eval_logits(inlay.merge(tuned), BATCH), wanted, "merged")
    close(eval_logits(theirs.merge_and_unload(), BATCH), wanted, "merged by PEFT")


@pytest.mark.parametrize("names", CHOICES, ids=["both", "up", "down"])
@every_family
def test_what_peft_saved_is_the_same_here(kind, names, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj"], target_parameters=names)
    theirs = randomized(peft.get_peft_model(build(kind), config))
    wanted = eval_logits(theirs, BATCH)
    theirs.save_pretrained(tmp_path)
    loaded = inlay.load(build(kind), tmp_path)
    close(eval_logits(loaded, BATCH), wanted, "logits")
    with inlay.disabled(loaded):
        close(eval_logits(loaded, BATCH), eval_logits(build(kind), BATCH), "disabled")


@every_family
def test_gradients_are_peft_s(kind, tmp_path):
    """Of the factors, and of everything below them: of an embedding that somebody unfroze."""
    tuned = randomized(tuned_on(kind)).train()
    tuned.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(kind), tmp_path, is_trainable=True).train()
    grads = []
    for model in (tuned, theirs):
        table = model.get_input_embeddings().weight.requires_grad_(True)
        model(**BATCH).loss.backward()
        grads.append(table.grad)
    close(grads[0], grads[1], "gradient of the embeddings")
    # by their names in PEFT's file
    held = {
        f"{path}.{key}": (piece, key, a)
        for path, module in _experts(tuned)
        for piece in module.deltas.values()
        for key, a in piece.stored.items()
    }
    compared = 0
    for name, parameter in theirs.named_parameters():
        if "lora_" not in name:
            continue
        piece, key, attribute = held[name.replace("base_model.model.", "", 1).replace(".default", "")]
        ours = piece.to_file(key, getattr(piece, attribute).grad)
        assert bool(parameter.grad.any()), name
        assert_close(ours, parameter.grad, atol=5e-5 * float(parameter.grad.abs().max()), what=name)
        compared += 1
    assert compared == len(held)


@every_family
def test_peft_s_own_lora_runs_on_fused_experts(kind):
    """PEFT parametrizes a stack while it runs: the fused module takes it as it is, and gradients reach the factors."""
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=BOTH)
    results = []
    for fused in (False, True):
        theirs = randomized(peft.get_peft_model(build(kind), config)).train()
        if fused:
            assert install_blocks(theirs)["FusedExperts"] == 2
        loss = theirs(**BATCH).loss
        loss.backward()
        grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach(), **grads})
    assert len(results[0]) == 1 + 2 * 2 * 2
    for name, wanted in results[0].items():
        assert_close(results[1][name], wanted, atol=5e-5 * float(wanted.abs().max()), what=name)


def _experts(model):
    return [(path, module) for path, module in model.named_modules() if isinstance(module, TunedExperts)]


def test_some_experts_alone(tmp_path):
    tuned = tuned_on("Qwen3Moe", experts=[3, 1])
    shapes = {tuple(p.shape) for p in tuned.parameters() if p.requires_grad}
    assert shapes == {(2, 3, 32), (2, 32, 3), (2, 3, 16)}
    randomized(tuned)
    wanted = eval_logits(tuned, BATCH)
    tuned.save_pretrained(tmp_path)
    loaded = inlay.load(build("Qwen3Moe"), tmp_path)
    assert_equal(eval_logits(loaded, BATCH), wanted, "loaded")
    theirs = peft.PeftModel.from_pretrained(build("Qwen3Moe"), tmp_path)
    close(eval_logits(theirs, BATCH), wanted, "in PEFT")
    before, merged = build("Qwen3Moe").state_dict(), inlay.merge(tuned).state_dict()
    for key, tensor in merged.items():
        same = (tensor == before[key]).flatten(1).all(1) if tensor.dim() == 3 else (tensor == before[key]).all()
        assert same.tolist() == ([True, False, True, False, True] if tensor.dim() == 3 else True), key


def test_experts_that_nobody_goes_to_get_a_gradient_of_zero():
    tuned = randomized(tuned_on("Qwen3Moe")).train()
    (_, module), *_ = _experts(tuned)
    piece = module.deltas["default"]
    x, index = torch.randn(4, 32), torch.tensor([[0, 2]] * 4)
    module(x, index, torch.rand(4, 2)).sum().backward()
    for name in piece.stored.values():
        hit = getattr(piece, name).grad.flatten(1).any(1)
        assert hit.tolist() == [True, False, True, False, False]


def test_two_adapters_at_once_and_added_up(tmp_path):
    tuned = randomized(tuned_on("Mixtral"))
    inlay.tune(tuned, inlay.LoRA(r=2, target_modules=["q_proj"], target_parameters=BOTH), adapter_name="second")
    randomized(tuned)
    tuned.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    tuned.set_adapter("sum")
    summed = eval_logits(tuned, BATCH)
    tuned.set_adapter(["default", "second"])
    close(eval_logits(tuned, BATCH), summed, "both active, and their sum")
    tuned.set_adapter("sum")
    inlay.export(tuned, tmp_path / "out", format="peft-lora")
    close(eval_logits(peft.PeftModel.from_pretrained(build("Mixtral"), tmp_path / "out"), BATCH), summed, "in PEFT")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 5


def test_errors_say_what_there_is():
    with pytest.raises(ValueError, match=r"'experts.gate_proj' matched no stack.*experts.down_proj"):
        tuned_on("Mixtral", ["experts.gate_proj"])
    with pytest.raises(ValueError, match=r"lora_dropout: wanted 0 with target_parameters, got 0.1"):
        inlay.LoRA(target_parameters=BOTH, lora_dropout=0.1)
    with pytest.raises(ValueError, match="experts: wanted target_parameters"):
        inlay.LoRA(experts=[1])
    with pytest.raises(TypeError, match="target_parameters: wanted a list"):
        inlay.LoRA(target_parameters="experts.down_proj")
    for bad in ([4], [1, 1], [], [-1]):
        with pytest.raises(ValueError, match="distinct numbers from 0 to 3"):
            tuned_on("Mixtral", experts=bad)


def test_compiled_it_is_the_same():
    """In fp32: in 16 bits a rounding sends a token to another expert, and that is another model."""
    tuned = randomized(tuned_on("Mixtral")).train()
    wanted = tuned(**BATCH).loss
    wanted.backward()
    grads = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    tuned.zero_grad()
    loss = torch.compile(tuned, backend="aot_eager")(**BATCH).loss
    loss.backward()
    assert abs(float(loss - wanted)) <= 1e-5 * float(wanted)
    for name, parameter in tuned.named_parameters():
        if name in grads:
            assert_close(parameter.grad, grads[name], atol=5e-5 * float(grads[name].abs().max()), what=name)
