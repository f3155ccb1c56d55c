"""What a proof must not be fooled by: clamps, clips, gates, masks, layers that differ, forwards put on an instance."""

from __future__ import annotations

import copy

import pytest
import torch
from census.tiny import first_tensor, tiny_model
from families import llama, text_batch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoAttention

import inlay
from inlay.nn.attention import attention_settings
from inlay.nn.blocks import install_blocks, mlp_settings, norm_settings
from inlay.nn.mixed import Mixed
from inlay.nn.probe import signature_of

LIMITS = (0.1, 1.0, 7.0, 10.0, 200.0, 5000.0)


def mlp(kind=LlamaMLP):
    return kind(llama().config)


def attention(kind=LlamaAttention, **options):
    config = copy.deepcopy(llama().config)
    for name, value in options.items():
        setattr(config, name, value)
    return kind(config, 0)


# --- gated MLPs --------------------------------------------------------------------------------------------


def clamped(limit):
    class Clamped(LlamaMLP):
        def forward(self, x):
            gate, up = self.gate_proj(x).clamp(max=limit), self.up_proj(x).clamp(-limit, limit)
            return self.down_proj(self.act_fn(gate) * up)

    return Clamped


@pytest.mark.parametrize("limit", LIMITS)
def test_a_clamp_at_any_height_is_seen(limit):
    assert mlp_settings(mlp(clamped(limit))) is None


class Gated(LlamaMLP):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate)


class Switched(LlamaMLP):
    def forward(self, x, **kwargs):
        return super().forward(x) * (2 if kwargs.get("twice") else 1)


class Trained(LlamaMLP):
    def forward(self, x):
        return super().forward(x) + self.training


class Scaled(LlamaMLP):
    def forward(self, x):
        return super().forward(x) * 1.001


class Saturating(LlamaMLP):
    def forward(self, x):
        return super().forward(x).clamp(-6e4, 6e4)


@pytest.mark.parametrize("kind", [Gated, Switched, Trained, Scaled, Saturating])
def test_mlps_that_are_left_alone(kind):
    model = nn.Sequential(mlp(kind), mlp())
    assert install_blocks(model) == {"FusedGatedMLP": 1}
    assert type(model[0]) is kind and isinstance(model[1], Mixed)


def test_a_forward_on_the_instance_is_not_passed_over():
    model = nn.Sequential(mlp(), mlp())
    model[0].forward = lambda x: x
    assert install_blocks(model) == {"FusedGatedMLP": 1} and not isinstance(model[0], Mixed)
    assert torch.equal(model[0](torch.ones(1, 32)), torch.ones(1, 32))


# --- norms -------------------------------------------------------------------------------------------------


class GatedNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states if gate is None else hidden_states * nn.functional.silu(gate))


class OtherEps(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2 * self.variance_epsilon)


class Bounded(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x.clamp(-100, 100))


class AtLeast(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-2)


@pytest.mark.parametrize("kind", [GatedNorm, OtherEps, Bounded, AtLeast])
def test_norms_that_are_left_alone(kind):
    assert norm_settings(LlamaRMSNorm(32, 1e-6)) == {"inlay_eps": 1e-6, "inlay_offset": 0.0}
    assert norm_settings(kind(32, 1e-6)) is None


# --- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", LIMITS)
def test_a_clip_of_queries_is_seen(limit):
    assert attention_settings(attention(OlmoAttention, clip_qkv=None)) is not None
    assert attention_settings(attention(OlmoAttention, clip_qkv=limit)) is None


class DropsMask(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        return super().forward(hidden_states, position_embeddings, None, past_key_values, **kwargs)


class Biased(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, bias=None):
        return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values)


class SoftCapped(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        out, weights = super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        return 1e3 * torch.tanh(out / 1e3), weights


@pytest.mark.parametrize("kind", [DropsMask, Biased, SoftCapped])
def test_attention_that_is_left_alone(kind):
    assert attention_settings(attention()) is not None
    assert attention_settings(attention(kind)) is None


def test_layers_that_differ_have_proofs_of_their_own():
    one, other = attention(), attention()
    other.layer_idx = 1
    other.config = one.config
    assert signature_of(one) == signature_of(other)
    one.config.layer_types = ["sliding_attention", "full_attention"]
    assert signature_of(one) != signature_of(other)
    one.config.layer_types = ["full_attention"] * 2
    assert signature_of(one) == signature_of(other)
    for name, values in {"window": (4, None), "ropes": ([1], [0]), "scale": (1.0, 2.0)}.items():
        setattr(one, name, values[0])
        setattr(other, name, values[1])
        assert signature_of(one) != signature_of(other), name
        setattr(other, name, values[0])
    one.register_buffer("steps", torch.ones(2))
    other.register_buffer("steps", torch.zeros(2))
    assert signature_of(one) != signature_of(other)


# --- models ------------------------------------------------------------------------------------------------

LOUD = ["bamba", "cohere2", "deepseek_v4", "falcon_h1", "gemma3_text", "gpt_oss", "granitemoehybrid"]
LOUD += ["llama4_text", "nemotron_h", "olmo", "smollm3", "zamba2"]


@pytest.mark.parametrize("model_type", LOUD)
@pytest.mark.parametrize("loudness", [1.0, 40.0])
def test_tuning_moves_no_logit_where_clamps_bite(model_type, loudness):
    """Weights scaled up, so that limits which a fresh model never reaches are reached."""
    model, inputs = tiny_model(model_type)
    if model_type == "olmo":
        model.config.clip_qkv = 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate_proj.weight", "up_proj.weight", "q_proj.weight", "k_proj.weight")):
                parameter.mul_(loudness)
    tuned = inlay.tune(copy.deepcopy(model), inlay.LoRA(r=2))
    for mode in (False, True):
        with torch.no_grad():
            wanted = first_tensor(copy.deepcopy(model).train(mode)(**inputs))
            got = first_tensor(tuned.train(mode)(**inputs))
        assert float((got - wanted).abs().max()) <= 2e-4 * float(wanted.abs().max()), (model_type, mode)


def test_plain_families_are_fused():
    for model_type in ("llama", "qwen3", "mistral", "olmo2", "gemma", "smollm3", "granite"):
        model, _ = tiny_model(model_type)
        counts = install_blocks(model)
        assert counts.get("FusedGatedMLP") == 2 and counts.get("FusedRMSNorm", 0) >= 5, (model_type, counts)


# --- the loss ----------------------------------------------------------------------------------------------


def test_a_head_that_is_read_before_its_loss_gives_ordinary_logits():
    tuned = inlay.tune(llama(), inlay.LoRA(r=2)).train()
    seen = []
    handle = tuned.lm_head.register_forward_hook(lambda module, args, out: seen.append(float(out.float().sum())))
    loss = tuned(**text_batch(0)).loss
    handle.remove()
    assert seen and torch.allclose(loss, tuned(**text_batch(0)).loss, atol=1e-5)


def test_loss_arguments_reach_the_fused_loss():
    plain = llama().train()
    tuned = inlay.tune(llama(), inlay.LoRA(r=2)).train()
    batch = text_batch(0)
    shifted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    for extra in ({}, {"num_items_in_batch": 5}, {"shift_labels": shifted}):
        wanted, got = plain(**batch, **extra).loss, tuned(**batch, **extra).loss
        assert torch.allclose(got, wanted, atol=2e-5), extra
        assert tuned._loss_function.last == "fused"
