"""LoRA equals PEFT's LoRA: the same A, the same losses, the same weights after training."""

from __future__ import annotations

import copy
import json

import oracle
import pytest
import torch
from comparing import assert_close, assert_equal, assert_series
from families import BY_NAME, FAMILIES, cast, eval_logits, llama, text_batch
from torch import nn

import inlay
from inlay.state import tuned_linears

peft = pytest.importorskip("peft")

STEPS, LEARNING_RATE = 5, 5e-3
OPTIONS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rank-stabilized": {"r": 8, "lora_alpha": 3, "use_rslora": True},
    "one rank": {"r": 1, "lora_alpha": 1},
    "wide": {"r": 40, "lora_alpha": 16},
}


def peft_model(model, ours, **options):
    """``model`` under PEFT's LoRA on the linears that ``ours`` tunes, with its A."""
    targets = sorted(tuned_linears(ours))
    head = ours.inlay_state.methods["default"].modules_to_save
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, modules_to_save=head, **options))
    factors = {}
    for name, module in theirs.base_model.model.named_modules():
        if name in targets:
            with torch.no_grad():
                module.lora_A["default"].weight.copy_(ours.get_submodule(name).deltas["default"].lora_A)
            factors[name] = module
    assert len(factors) == len(targets)
    return theirs, factors


def train(model, batches, **options):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, **options)
    return oracle.train(model, optimizer, batches)


def compare(family, options, dtype=torch.float32, tolerance=2e-5, fused=True):
    dense = family.build().to(dtype)
    ours = inlay.tune(copy.deepcopy(dense), inlay.LoRA(**options), fused_blocks=fused, fused_loss=fused)
    theirs, factors = peft_model(dense, ours, **options)
    batches = [cast(family.batch(seed), dtype) for seed in range(STEPS)]
    # eps above the rounding of gradients: Adam would make a step of full size out of a gradient that is rounding alone.
    losses = [train(model, batches, weight_decay=0.1, eps=1e-4) for model in (ours, theirs)]
    assert len(set(losses[1])) == STEPS
    assert_series(losses[0], losses[1], rtol=tolerance, what="losses")
    for name, module in factors.items():
        delta = ours.get_submodule(name).deltas["default"]
        for held, wanted in ((delta.lora_A, module.lora_A), (delta.lora_B, module.lora_B)):
            assert_close(held, wanted["default"].weight, atol=5 * tolerance, what=name)
        assert delta.changes_anything()
    plain = theirs.merge_and_unload().state_dict()
    for key, tensor in inlay.merge(ours).state_dict().items():
        assert_close(tensor, plain[key], atol=5 * tolerance, what=key)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_equals_peft(family, options):
    compare(BY_NAME[family], options)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in ("llama", "gpt2", "bert")], ids=str)
def test_other_families(family):
    compare(family, {"r": 4, "lora_alpha": 8})


def test_in_float64():
    """Where rounding is no excuse. The causal families' own loss goes through fp32."""
    compare(BY_NAME["bert"], OPTIONS["plain"], torch.float64, 1e-9)


def test_without_fused_modules():
    compare(BY_NAME["llama"], OPTIONS["plain"], fused=False)


def test_dropout_of_the_same_mask():
    """Dropout draws once per linear, as PEFT's does: with everything else equal the first losses agree."""
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3}
    linear = nn.Sequential(nn.Linear(32, 16))
    ours = inlay.tune(copy.deepcopy(linear), inlay.LoRA(target_modules=["0"], **options))
    theirs, factors = peft_model(copy.deepcopy(linear), ours, **options)
    with torch.no_grad():
        b = torch.randn(16, 4)
        ours[0].deltas["default"].lora_B.copy_(b)
        factors["0"].lora_B["default"].weight.copy_(b)
    x = torch.randn(5, 32)
    outputs = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        outputs.append(model(x))
    assert_close(outputs[0].detach(), outputs[1].detach(), atol=1e-5)
    assert not torch.allclose(outputs[0], ours.eval()(x))


def test_an_adapter_goes_to_peft(tmp_path):
    """The adapter directory is one PEFT loads as it is."""
    family = BY_NAME["llama"]
    ours = inlay.tune(family.build(), inlay.LoRA(r=4, lora_alpha=6, use_rslora=True))
    train(ours, [family.batch(seed) for seed in range(2)])
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(family.build(), tmp_path)
    assert_close(eval_logits(theirs, family.batch(7)), eval_logits(ours, family.batch(7)), atol=1e-5)


def test_init_and_seed():
    """B zero, A Kaiming-uniform: no logit changes, and the seed decides what is drawn."""
    base, wanted = llama(), None
    wanted = eval_logits(base, text_batch(0))
    drawn = []
    for seed in (0, 0, 1):
        model = inlay.tune(copy.deepcopy(base), inlay.LoRA(r=4, seed=seed))
        assert_close(eval_logits(model, text_batch(0)), wanted, atol=1e-5)
        delta = tuned_linears(model)["model.layers.0.mlp.up_proj"].deltas["default"]
        assert not bool(delta.lora_B.any()) and float(delta.lora_A.abs().max()) <= 32**-0.5
        drawn.append(delta.lora_A.detach().clone())
    assert_equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_micro_batches_equal_one_batch():
    def gradients(pieces):
        model = inlay.tune(llama(), inlay.LoRA(r=4))
        with torch.no_grad():
            for module in tuned_linears(model).values():
                module.deltas["default"].lora_B.fill_(0.05)
        batch = text_batch(0, rows=4)
        count = int((batch["labels"][:, 1:] != -100).sum())
        for i in range(pieces):
            model(**{k: v.chunk(pieces)[i] for k, v in batch.items()}, num_items_in_batch=count).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    one = gradients(1)
    for name, gradient in gradients(4).items():
        assert_close(gradient, one[name], atol=1e-5 * float(one[name].abs().max()) + 1e-9, what=name)


def test_bad_options():
    for options, message in (
        ({"r": 0}, "r: wanted a rank of 1 or more, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout: wanted a probability"),
        ({"init": "loftk"}, "init: wanted one of .*'loftq'"),
        ({"init": "loftq", "loftq_iterations": 0}, "loftq_iterations: wanted 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            inlay.LoRA(**options)


# --- LoftQ ------------------------------------------------------------------------------------------------------------

LOFTQ = inlay.LoRA(r=8, lora_alpha=16, init="loftq")


@pytest.mark.parametrize("base", ["nf4", "fp4", "int8", inlay.BaseConfig("nf4", double_quant=True)], ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (96, 96)])
def test_loftq_comes_closer_at_every_iteration(base, shape):
    from inlay.bases import BaseConfig, QuantizedLinear
    from inlay.methods.loftq import loftq
    from inlay.pieces.linear import LowRankDelta

    linear = nn.Linear(shape[1], shape[0], bias=False)
    storage = BaseConfig.of(base).storage(None, *shape)
    module = QuantizedLinear.of(linear, storage, "l")
    plain = float((module.weight - linear.weight.detach()).norm())
    delta = LowRankDelta(linear.weight, 8, 2.0)
    norms = loftq(linear.weight.detach(), module, delta, 8, "l")
    assert norms[0] < plain and all(later < earlier for earlier, later in zip(norms, norms[1:], strict=False))
    assert base == "int8" or len(norms) >= 3
    assert abs(float((module.weight + delta.weight_delta() - linear.weight.detach()).norm()) - norms[-1]) < 1e-4


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64), (1, 30), (1100, 1030)])
def test_best_low_rank(shape):
    """As good as a singular value decomposition; large matrices within 1e-3 of it."""
    from inlay.methods.loftq import best_low_rank

    residual = torch.randn(shape)
    u, s, vt = torch.linalg.svd(residual, full_matrices=False)
    for rank in (1, 8, 50):
        if rank > min(shape):
            continue
        a, b = best_low_rank(residual, rank)
        assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
        best = float((residual - (u[:, :rank] * s[:rank]) @ vt[:rank]).norm())
        assert float((residual - b @ a).norm()) <= best * (1 + 1e-3 if min(shape) > 1024 else 1 + 1e-5) + 1e-4
        assert_close(b.norm(dim=0), a.norm(dim=1), atol=1e-3 * float(a.norm()))  # split evenly


def test_loftq_starts_closer_to_the_dense_model():
    """Its first loss and first logits are nearer the dense model's than plain QLoRA's."""
    dense, batch = llama(hidden_size=64, intermediate_size=128), text_batch(0)
    wanted = eval_logits(dense, batch)
    with torch.no_grad():
        loss = float(dense(**batch).loss)
    off = {}
    for init in ("default", "loftq"):
        model = inlay.tune(copy.deepcopy(dense), inlay.LoRA(r=16, init=init), base="nf4")
        with torch.no_grad():
            off[init] = abs(float(model(**batch).loss) - loss), float((eval_logits(model, batch) - wanted).norm())
    assert off["loftq"][0] < off["default"][0] and off["loftq"][1] < 0.8 * off["default"][1]


def test_loftq_adapters_bring_their_base(tmp_path):
    """Loading quantizes the dense model as tuning did, and takes the trained factors, not the initial ones."""
    base = inlay.BaseConfig("nf4", double_quant=True, overrides={"down_proj": "int8"})
    model = inlay.tune(llama(), LOFTQ, base=base)
    train(model, [text_batch(seed) for seed in range(3)])
    model.save_pretrained(tmp_path)
    wanted = eval_logits(model, text_batch(9))
    recorded = json.loads((tmp_path / "adapter_config.json").read_text())["inlay"]["base"]
    assert recorded["base"] == "nf4" and recorded["overrides"] == {"down_proj": "int8"}
    again = inlay.load(llama(), tmp_path, base=inlay.BaseConfig(**recorded))
    assert_equal(eval_logits(again, text_batch(9)), wanted)
    for other in (None, "nf4", inlay.BaseConfig("nf4", double_quant=True)):
        with pytest.raises(
            ValueError, match=r'init="loftq", which chose the quantized base with it: wanted .*overrides'
        ):
            inlay.load(llama(), tmp_path, base=other)


def test_loftq_with_more_rank_than_the_weight():
    model = inlay.tune(llama(), inlay.LoRA(r=40, init="loftq"), base="nf4")
    assert_close(eval_logits(model, text_batch(0)), eval_logits(llama(), text_batch(0)), atol=1e-3)


def test_loftq_needs_a_base():
    with pytest.raises(ValueError, match='init="loftq" chooses the quantized base: pass base="nf4"'):
        inlay.tune(llama(), LOFTQ)
    model = llama()
    inlay.bases.quantize_linears(model, inlay.BaseConfig())
    with pytest.raises(ValueError, match="starts from the dense weight, and this one is quantized already"):
        inlay.tune(model, LOFTQ, base="nf4")
