"""Fused blocks: found by probing, equal to the eager ones, and taken off again."""

from __future__ import annotations

import copy
import re
from collections import Counter

import pytest
import torch
from comparing import assert_close
from families import BY_NAME, FAMILIES, TOKENS, llama, perturb, text_batch
from oracle import deltas_of, randomize
from torch import nn

import inlay
from inlay.nn.blocks import install_blocks, mlp_settings, norm_settings
from inlay.nn.mixed import Mixed

BLOCKS = {"FusedAttention", "FusedDeltaRule", "FusedExperts", "FusedGatedMLP", "FusedGatedRMSNorm", "FusedRMSNorm"}


def fused_blocks(model) -> dict[str, int]:
    mixins = [type(module)._inlay_mixin.__name__ for module in model.modules() if isinstance(module, Mixed)]
    return dict(Counter(name for name in mixins if name in BLOCKS))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_which_blocks_are_fused(family):
    tuned = inlay.tune(family.build(), inlay.S2FT(ratio=0.2))
    assert fused_blocks(tuned) == dict(family.blocks)
    assert fused_blocks(inlay.merge(tuned)) == {}


def outputs_and_gradients(model, batch):
    """Loss, last hidden state or logits, and gradients of the deltas, the norms and the embeddings."""
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return outputs.loss, outputs.logits, gradients


FUSED = [family for family in FAMILIES if family.blocks]


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("family", FUSED, ids=str)
def test_equal_the_eager_blocks(family, dtype):
    """Forward and backward, with everything trainable: gradients reach norms, biases and embeddings too."""
    eager = inlay.tune(family.build(), inlay.S2FT(ratio=0.2), fused_blocks=False, fused_loss=False)
    fused = inlay.tune(family.build(), inlay.S2FT(ratio=0.2), fused_loss=False)
    tuned_weights = {f"{path}.{key}" for path in deltas_of(eager) for key in ("weight", "bias")}
    for model in (eager, fused):
        randomize(model, 0.1)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in tuned_weights)  # TunedLinear's own are frozen by contract
    # The outputs of its rule are normalized by themselves, and some are a thousandth of others.
    atol = 1e-4 if family.name == "qwen3_5" else 1e-5
    for seed in range(2):
        loss, logits, wanted = outputs_and_gradients(eager, family.batch(seed))
        ours = outputs_and_gradients(fused, family.batch(seed))
        assert_close(ours[0], loss, atol=atol, what="loss")
        assert_close(ours[1], logits, atol=atol, what="logits")
        for name, gradient in wanted.items():
            if re.search(r"dt_bias|A_log|in_proj_a\.", name):
                continue  # the eager ones of decays are inexact: tests/nn/test_delta_rule.py has them in float64
            if gradient is not None:
                size = float(gradient.abs().max())
                assert_close(ours[2][name], gradient, atol=atol * max(size, 1e-3), what=name)


def test_a_cache_is_asked_as_the_module_asks_it():
    """A paged cache reads and writes what the module hands it beside keys and values."""
    from transformers import DynamicCache

    class Recording(DynamicCache):
        def update(self, key, value, layer, *args, **keywords):
            asked.append((layer, args, {k: sorted(v) if isinstance(v, dict) else v for k, v in keywords.items()}))
            return super().update(key, value, layer, *args, **keywords)

    eager, seen = llama().eval(), []
    for model in (eager, inlay.tune(copy.deepcopy(eager), inlay.S2FT(ratio=0.2)).eval()):
        asked = []
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=Recording(), use_cache=True)
        seen.append(asked)
    assert seen[0] and seen[0] == seen[1]


@pytest.mark.parametrize(
    "name, attention",
    [(name, how) for name in ("llama", "qwen3", "mistral") for how in ("eager", "sdpa")]
    + [(name, "eager") for name in ("gemma2", "gpt_oss", "granite_swa")],
)
def test_attention_masks_positions_and_caches(name, attention):
    """Left padding, shifted positions, a cache filled in pieces: what generation and packing use."""
    eager = BY_NAME[name].build().eval()
    eager.set_attn_implementation(attention)
    fused = inlay.tune(copy.deepcopy(eager), inlay.S2FT(ratio=0.2))
    batch = text_batch(0)
    ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
    mask[1, :4] = 0
    positions = torch.arange(TOKENS).expand(3, -1) + 3
    with torch.no_grad():
        results = []
        for model in (eager, fused):
            model.eval()
            plain = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            moved = model(input_ids=ids, position_ids=positions).logits
            first = model(input_ids=ids[:, :6], use_cache=True)
            rest = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
            results.append({"padded": plain, "moved": moved, "start": first.logits, "cached": rest.logits})
    for key, wanted in results[0].items():
        assert_close(results[1][key], wanted, atol=1e-5, what=key)


def test_packed_sequences_by_position():
    """Two samples in one row, told apart by their positions, see nothing of each other."""
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2)).eval()
    ids = text_batch(0)["input_ids"][:1]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        packed = tuned(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = tuned(input_ids=ids[:, 5:]).logits
    assert_close(packed[:, 5:], alone, atol=1e-5, what="second sample")


def test_norms_are_told_apart():
    """Epsilon, offset, and what is no RMS norm at all."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert norm_settings(LlamaRMSNorm(16, eps=1e-5)) == {"inlay_eps": 1e-5, "inlay_offset": 0.0}
    assert norm_settings(GemmaRMSNorm(16, eps=1e-6)) == {"inlay_eps": 1e-6, "inlay_offset": 1.0}
    assert norm_settings(nn.RMSNorm(16, eps=1e-5)) == {"inlay_eps": 1e-5, "inlay_offset": 0.0}
    assert norm_settings(nn.LayerNorm(16)) is None
    assert norm_settings(nn.LayerNorm(16, bias=False)) is None

    class Twice(LlamaRMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    class OtherEps(LlamaRMSNorm):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 3 * self.variance_epsilon) * self.weight

    assert norm_settings(Twice(16)) is None
    assert norm_settings(OtherEps(16, eps=1e-5)) is None


class Gated(nn.Module):
    """A gated MLP with the attribute names of Llama's, computing what ``rule`` says."""

    def __init__(self, rule):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down_proj = nn.Linear(12, 8, bias=False)
        self.rule = rule

    def forward(self, x):
        return self.rule(self, x)


def _gated(act, swapped=False, factor=1.0):
    def rule(mlp, x):
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        gate, up = (up, gate) if swapped else (gate, up)
        return factor * mlp.down_proj(act(gate) * up)

    return rule


@pytest.mark.parametrize(
    "rule, wanted",
    [
        (_gated(nn.functional.silu), {"inlay_act": "silu"}),
        (_gated(nn.functional.gelu), {"inlay_act": "gelu"}),
        (_gated(nn.GELU(approximate="tanh")), {"inlay_act": "gelu_tanh"}),
        (_gated(nn.functional.relu), None),
        (_gated(nn.functional.silu, swapped=True), None),
        (_gated(nn.functional.silu, factor=1.001), None),
        (lambda mlp, x: nn.functional.dropout(_gated(nn.functional.silu)(mlp, x), 0.5, mlp.training), None),
    ],
)
def test_gated_mlps_are_told_apart(rule, wanted):
    assert mlp_settings(Gated(rule)) == wanted


@pytest.mark.parametrize("training", [True, False])
def test_dropout_in_an_mlp_stays_whatever_mode_the_model_is_tuned_in(training):
    class Dropping(Gated):
        def __init__(self):
            super().__init__(_gated(nn.functional.silu))
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(super().forward(x))

    model = nn.ModuleDict({"mlp": Dropping(), "plain": Gated(_gated(nn.functional.silu))}).train(training)
    assert install_blocks(model) == {"FusedGatedMLP": 1}
    assert not isinstance(model["mlp"], Mixed)
    assert all(module.training is training for module in model.modules())


def test_attention_dropout_stays():
    """It is passed on to the attention function, in training only."""
    tuned = inlay.tune(llama(attention_dropout=0.5), inlay.S2FT(ratio=0.2))
    assert fused_blocks(tuned)["FusedAttention"] == 2
    batch = text_batch(0)
    assert tuned(**batch).loss.item() != tuned(**batch).loss.item()
    tuned.eval()
    assert tuned(**batch).loss.item() == tuned(**batch).loss.item()


def test_hooks_and_replaced_submodules_still_count():
    """A hook on a projection fires inside the fused attention and the fused MLP."""
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2))
    seen = []
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        tuned.model.layers[0].get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    tuned(**text_batch(0))
    assert sorted(seen) == sorted(["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])


def test_installing_twice_changes_nothing():
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2))
    assert install_blocks(tuned) == {}


def test_models_of_plain_torch():
    """No config, no transformers: linears are tuned, an nn.RMSNorm is fused, the rest is left alone."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc1, self.fc2 = nn.RMSNorm(16, eps=1e-5), nn.Linear(16, 20), nn.Linear(20, 16)

        def forward(self, x):
            return x + self.fc2(torch.relu(self.fc1(self.norm(x))))

    plain, x = perturb(Plain()), torch.randn(3, 5, 16)
    tuned = inlay.tune(copy.deepcopy(plain), inlay.S2FT(ratio=0.2))
    assert fused_blocks(tuned) == {"FusedRMSNorm": 1} and list(deltas_of(tuned)) == ["fc2"]
    assert_close(tuned(x), plain(x), atol=1e-6, what="output")
    tuned(x).sum().backward()
    assert bool(deltas_of(tuned)["fc2"].s2ft_values.grad.any())
