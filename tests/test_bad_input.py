"""Models that cannot be tuned, or not yet: a clear refusal, and the model left as it was."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close
from families import BY_NAME, eval_logits, llama, text_batch
from oracle import deltas_of, randomize, train
from torch import nn
from torch.nn.utils import prune

import inlay
from inlay.nn.tuned_linear import TunedLinear


def refused(model, match, error=ValueError, method=None, **options):
    """`tune` raises, and nothing about the model changed."""
    method = inlay.S2FT(target_modules="all-linear", granularity=1) if method is None else method
    modules = dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        inlay.tune(model, method, **options)
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[name] is modules[name] for name in modules)
    assert not any(isinstance(module, TunedLinear) for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not hasattr(model, "inlay_state")


class Two(nn.Module):
    """Two linears of one shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


# --- weights that are shared ----------------------------------------------------------------------------


def test_a_head_tied_to_the_embedding():
    method = inlay.S2FT(target_modules=["lm_head"])
    match = "lm_head.weight is shared with model.embed_tokens.weight .*untie them or add it to exclude_modules"
    refused(BY_NAME["gemma"].build(), match, method=method)
    refused(BY_NAME["gpt2"].build(), "lm_head.weight is shared with transformer.wte.weight", method=method)
    tuned = inlay.tune(BY_NAME["gemma"].build(), inlay.S2FT(target_modules="all-linear"))
    assert "lm_head" not in deltas_of(tuned)


def test_a_linear_used_twice():
    model = Two()
    model.second = model.first
    refused(model, "first.weight is shared with second.weight")
    refused(model, "shared", method=inlay.S2FT(target_modules=["first"]))


def test_one_parameter_in_two_linears():
    model = Two()
    model.second.weight = model.first.weight
    refused(model, "first.weight is shared with second.weight")


def test_one_memory_under_two_parameters():
    """Tied by `.data`, as older code does: an in-place update would change both."""
    model = Two()
    model.second.weight = nn.Parameter(model.first.weight.data)
    refused(model, "first.weight is shared with second.weight", method=inlay.S2FT(target_modules=["first"]))


def test_shared_linears_that_are_not_tuned_are_no_matter():
    model = nn.ModuleDict({"a": Two(), "b": nn.Linear(8, 8)})
    model["a"].second = model["a"].first
    assert list(deltas_of(inlay.tune(model, inlay.S2FT(target_modules=["b"])))) == ["b"]


def test_an_exclusion_is_the_way_out():
    model = BY_NAME["gpt2"].build()
    tuned = inlay.tune(model, inlay.S2FT(target_modules=r".*(lm_head|c_fc)", exclude_modules=["lm_head"]))
    assert sorted(deltas_of(tuned)) == [f"transformer.h.{i}.mlp.c_fc" for i in (0, 1)]


# --- weights that are not there, or not dense -----------------------------------------------------------


def test_meta_weights():
    with torch.device("meta"):
        model = Two()
    refused(model, "first is on the meta device: load its weights before tune")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_weights_that_another_library_quantized(dtype):
    model = Two()
    model.first.weight = nn.Parameter(torch.zeros(8, 8).to(dtype), requires_grad=False)
    refused(model, f"first: wanted a weight of float32.*got {dtype}.*quantized by another library")


def test_computed_weights():
    model = Two()
    nn.utils.parametrizations.weight_norm(model.first)
    refused(model, "first: .*computed from others.*before tune")
    pruned = Two()
    prune.random_unstructured(pruned.first, "weight", 0.3)
    refused(pruned, "first: .*computed from others")
    prune.remove(pruned.first, "weight")
    inlay.tune(pruned, inlay.S2FT(target_modules=["first"]))


def test_linears_of_other_libraries():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x).abs()

    model = Two()
    model.first = Odd(8, 8)
    method = inlay.S2FT(target_modules=["first", "second"])
    refused(model, r"first: Odd is a linear by class and computes something else .*add it to exclude", method=method)
    inlay.tune(model, inlay.LoRA(r=2, target_modules="all-linear"))  # which leaves it out
    assert type(model.first) is Odd


# --- parents that do not call their linears -------------------------------------------------------------


def test_multihead_attention():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    refused(model, "attention.out_proj belongs to a MultiheadAttention.*without calling it.*exclude_modules")
    tuned = inlay.tune(model, inlay.S2FT(target_modules="all-linear", exclude_modules=["out_proj"]))
    assert list(deltas_of(tuned)) == ["mlp"]


@pytest.mark.parametrize("target", ["linear1", "linear2", "out_proj"])
def test_transformer_encoder_layers(target):
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for model in (layer, encoder):
        method = inlay.S2FT(target_modules=[target], granularity=1)
        refused(model, f"{target} belongs to a (TransformerEncoderLayer|MultiheadAttention)", method=method)


def test_transformer_decoder_layers_call_theirs():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0), 2)
    tuned = inlay.tune(model, inlay.S2FT(target_modules=["linear1", "linear2"], ratio=0.3))
    randomize(tuned, 0.3)
    x, memory = torch.randn(3, 2, 8), torch.randn(4, 2, 8)
    assert_close(tuned(x, memory), inlay.merge(tuned)(x, memory), atol=1e-5, what="output")
    tuned(x, memory).pow(2).sum().backward()
    assert all(bool(delta.s2ft_values.grad.any()) for delta in deltas_of(tuned).values())


# --- calls that make no sense ---------------------------------------------------------------------------


def test_tuning_twice():
    tuned = inlay.tune(llama(), inlay.S2FT())
    keys = list(tuned.state_dict())
    with pytest.raises(ValueError, match="tuned already with an adapter 'default'; pass another adapter_name, or"):
        inlay.tune(tuned, inlay.S2FT(ratio=0.5))
    assert list(tuned.state_dict()) == keys


@pytest.mark.parametrize("method", [None, "s2ft", {"ratio": 0.1}, inlay.S2FT])
def test_no_method(method):
    model = llama()
    with pytest.raises(TypeError, match=r"method: wanted a config such as inlay.S2FT\(ratio=0.03\), got"):
        inlay.tune(model, method)


def test_a_plain_model_where_a_tuned_one_is_wanted():
    match = "wanted a model from inlay.tune or inlay.load, got a plain LlamaForCausalLM"
    with pytest.raises(TypeError, match=f"merge: {match}"):
        inlay.merge(llama())
    with pytest.raises(TypeError, match=match), inlay.disabled(llama()):
        raise AssertionError("entered")


def test_verify_says_what_it_wants():
    tuned = inlay.tune(llama(), inlay.S2FT())
    with pytest.raises(ValueError, match="wanted at least one prompt"):
        inlay.verify(tuned, llama(), [])
    with pytest.raises(ValueError, match="pass tokenizer="):
        inlay.verify(tuned, llama(), ["a text"])
    with pytest.raises(ValueError, match="logits of one shape"):
        inlay.verify(tuned, llama(vocab_size=101), [torch.tensor([3, 4])])


# --- batches that are hardly any ------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["additive", "in_place"])
def test_one_token_and_one_row(update):
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2, update=update))
    randomize(tuned, 0.1)
    merged = inlay.merge(tuned)
    for rows, tokens in ((1, 1), (1, 2), (2, 1)):
        ids = torch.randint(3, 97, (rows, tokens))
        assert_close(
            eval_logits(tuned, {"input_ids": ids}), eval_logits(merged, {"input_ids": ids}), atol=1e-5, what="logits"
        )
    loss = tuned(input_ids=ids, labels=ids).loss  # one token has no next one
    assert bool(loss.isnan())


@pytest.mark.parametrize("update", ["additive", "in_place"])
def test_all_but_one_token_ignored(update):
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2, update=update))
    batch = text_batch(0)
    labels = torch.full_like(batch["labels"], -100)
    labels[1, 4] = 7
    losses = train(
        tuned,
        torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0),
        [{**batch, "labels": labels}] * 6,
    )
    assert losses[-1] < losses[0] - 0.1


def test_a_diverged_weight_shows_everywhere():
    """NaN in a trained value reaches the logits, the loss and every gradient: nothing hides it."""
    for update in ("additive", "in_place"):
        tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2, update=update))
        with torch.no_grad():
            deltas_of(tuned)["model.layers.0.mlp.down_proj"].s2ft_values[3, 1] = float("nan")
        assert bool(eval_logits(tuned, text_batch(0)).isnan().any())
        loss = tuned(**text_batch(0)).loss
        assert bool(loss.isnan())
        loss.backward()
        assert all(bool(delta.s2ft_values.grad.isnan().any()) for delta in deltas_of(tuned).values())


@pytest.mark.parametrize("update", ["additive", "in_place"])
def test_odd_model_widths(update):
    odd = {"hidden_size": 203, "intermediate_size": 113, "num_attention_heads": 7, "num_key_value_heads": 1}
    method = inlay.S2FT(channels={"o_proj": 14, "down_proj": 7}, update=update)
    tuned = inlay.tune(llama(**odd, head_dim=14), method)
    randomize(tuned, 0.05)
    merged = inlay.merge(tuned)
    assert_close(eval_logits(tuned, text_batch(0)), eval_logits(merged, text_batch(0)), atol=2e-5, what="logits")
    for path in deltas_of(tuned):
        merged.get_submodule(path).weight.requires_grad_(True)
    merged.train()(**text_batch(0)).loss.backward()
    tuned.train()(**text_batch(0)).loss.backward()
    for path, delta in deltas_of(tuned).items():
        wanted = merged.get_submodule(path).weight.grad.index_select(1, delta.s2ft_indices)
        assert_close(delta.s2ft_values.grad, wanted, atol=1e-5 * float(wanted.abs().max()), what=path)
