"""Models whose attention caps its scores or has sinks: our kernel runs in the place of their eager attention."""

from __future__ import annotations

import copy

import pytest
import torch
from census.tiny import first_tensor, tiny_model
from comparing import assert_close
from families import BY_NAME, VOCABULARY, text_batch

import inlay
from inlay import _native
from inlay.nn import attention as fused
from inlay.nn.attention import FusedAttention, attention_settings
from inlay.nn.blocks import install_blocks

pytestmark = pytest.mark.skipif(
    not _native.available() or _native.module().isa() == "scalar", reason="no kernel of ours would be the faster one"
)

#: Family, and whether its heads have sinks; else its scores have a soft cap.
NAMES = {"gemma2": False, "gpt_oss": True, "granite_swa": True}


@pytest.fixture
def calls(monkeypatch):
    """Arguments of each call of our attention."""
    seen, own = [], fused.attention

    def counted(*args):
        seen.append(args)
        return own(*args)

    monkeypatch.setattr(fused, "attention", counted)
    return seen


def _batch(how):
    batch = text_batch(0, tokens=19)
    if how == "padded":
        return batch
    del batch["attention_mask"]
    batch["labels"] = batch["input_ids"].clone()
    if how == "packed":
        at = torch.arange(19)
        batch["position_ids"] = torch.where(at < 7, at, at - 7).expand(3, -1)
    return batch


def _step(model, batch):
    model.zero_grad()
    out = model(**batch, use_cache=False)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["plain", "padded", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_those_of_eager_attention(name, how, calls):
    """With everything training: the gradients of sinks too."""
    eager, batch = BY_NAME[name].build(), _batch(how)
    tuned = copy.deepcopy(eager)
    install_blocks(tuned)
    calls.clear()
    with torch.no_grad():
        wanted_logits, logits = (model(**batch, use_cache=False).logits for model in (eager, tuned))
    assert_close(logits, wanted_logits, atol=1e-5, what="logits")
    calls.clear()
    loss, ours = _step(tuned, batch)
    assert len(calls) == eager.config.num_hidden_layers
    assert all((args[6] is not None) == NAMES[name] == (args[5] is None) for args in calls)
    wanted_loss, wanted = _step(eager, batch)
    assert_close(loss, wanted_loss, atol=1e-5, what="loss")
    assert ours.keys() == wanted.keys() and any("sinks" in key for key in wanted) == NAMES[name]
    for key, gradient in wanted.items():
        assert_close(ours[key], gradient, atol=1e-5 * max(1.0, float(gradient.abs().max())), what=key)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_writes_what_eager_attention_writes(name, calls):
    eager = BY_NAME[name].build().eval()
    tuned = copy.deepcopy(eager)
    install_blocks(tuned)
    calls.clear()
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    wanted, got = (m.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None) for m in (eager, tuned))
    assert torch.equal(got, wanted)
    assert len(calls) == 9 * eager.config.num_hidden_layers and {args[0].shape[2] for args in calls} == {1, 7}


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_somebody_reads_are_there(name, calls):
    eager = BY_NAME[name].build().eval()
    tuned = copy.deepcopy(eager)
    install_blocks(tuned)
    calls.clear()
    batch = {"input_ids": text_batch(0)["input_ids"]}
    with torch.no_grad():
        wanted, got = (model(**batch, output_attentions=True).attentions for model in (eager, tuned))
        assert not calls and len(got) == len(wanted) == eager.config.num_hidden_layers
        for a, b in zip(got, wanted):
            assert_close(a, b, atol=1e-5, what="weights")
        seen = []
        block = next(m for m in tuned.modules() if isinstance(m, FusedAttention))
        handle = block.register_forward_hook(lambda module, args, out: seen.append(out[1]))
        tuned(**batch)
        handle.remove()
    assert seen[0] is not None and len(calls) == eager.config.num_hidden_layers - 1


def test_eager_attention_that_was_asked_for_stays(calls):
    """Where torch has an attention for the model, eager is somebody's wish."""
    model = BY_NAME["llama"].build()
    model.set_attn_implementation("eager")
    tuned = inlay.tune(model, inlay.LoRA(r=2)).train()
    calls.clear()
    _step(tuned, _batch("plain"))
    assert not calls


def test_eager_attention_that_is_another_formula_is_not_ours(monkeypatch, calls):
    """The proof runs the function beside the module's class: a cap put on after the mask, twice the sinks."""
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gpt_oss import modeling_gpt_oss

    def wider(own):
        return lambda *args, softcap=None, **kwargs: own(
            *args, softcap=None if softcap is None else 1.01 * softcap, **kwargs
        )

    def doubled(own):
        def attend(module, *args, **kwargs):
            out, weights = own(module, *args, **kwargs)
            return out * (1 + weights.sum(-1).transpose(1, 2)[..., None] * 1e-3), weights

        return attend

    for name, modeling, change in (("gemma2", modeling_gemma2, wider), ("gpt_oss", modeling_gpt_oss, doubled)):
        model = BY_NAME[name].build()
        block = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
        assert attention_settings(block)["inlay_eager"]
        monkeypatch.setattr(modeling, "eager_attention_forward", change(modeling.eager_attention_forward))
        assert not attention_settings(block)["inlay_eager"]
        install_blocks(model)
        calls.clear()
        _step(model, _batch("plain"))
        assert not calls


@pytest.mark.parametrize("model_type", ["granitemoe_swa", "vaultgemma", "t5gemma"])
def test_other_families_with_caps_or_sinks(model_type, calls):
    model, inputs = tiny_model(model_type)
    fused_model = copy.deepcopy(model)
    assert install_blocks(fused_model)["FusedAttention"] >= 2
    calls.clear()
    with torch.no_grad():
        wanted, got = first_tensor(model.eval()(**inputs)), first_tensor(fused_model.eval()(**inputs))
    assert calls
    assert_close(got, wanted, atol=1e-5, what="output")


def test_bf16_errs_no_more_than_eager_attention():
    for name in NAMES:
        exact = BY_NAME[name].build().eval()
        eager = copy.deepcopy(exact).bfloat16()
        tuned = copy.deepcopy(eager)
        install_blocks(tuned)
        ids = text_batch(0, tokens=19)["input_ids"]
        with torch.no_grad():
            for_certain, plain, ours = (m(input_ids=ids, use_cache=False).logits.float() for m in (exact, eager, tuned))
        assert float((ours - for_certain).norm()) <= 1.1 * float((plain - for_certain).norm()), name


@pytest.mark.parametrize("name", ["gemma2", "granite_swa"])
def test_padding_is_dropped_for_them_too(name):
    """Samples run by their lengths in one row, with the loss and gradients of the padded batch. Not GPT-OSS's:
    transformers makes it no masks of positions that restart, which ours would be compared with."""
    results = []
    for mode in (False, True):
        tuned = inlay.tune(BY_NAME[name].build(), inlay.LoRA(r=2)).train()
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.sin(torch.arange(parameter.numel()).float()).view_as(parameter) * 0.05)
        tuned.set_padding_free(mode)
        batch = text_batch(0, rows=4, tokens=40)
        for row, length in enumerate((9, 40, 3, 17)):
            batch["attention_mask"][row, length:] = 0
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        results.append(_step(tuned, batch))
    assert_close(results[1][0], results[0][0], atol=1e-5, what="loss")
    for key, gradient in results[0][1].items():
        assert_close(results[1][1][key], gradient, atol=1e-5, what=key)
