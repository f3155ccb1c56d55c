"""Masks seen as stretches of keys, and the fused attention that takes them."""

import pytest
import torch
from comparing import assert_close
from families import BY_NAME, text_batch

import inlay
from inlay import _native
from inlay.nn import attention as fused
from inlay.nn.spans import spans_of
from inlay.ops.attention import mask_of

pytestmark = pytest.mark.skipif(not _native.available(), reason="the native module is not built")


def _causal(tokens):
    return torch.ones(tokens, tokens).tril().bool()


def test_spans_say_what_the_mask_says():
    causal, real = _causal(9), torch.ones(2, 9).bool()
    real[1, 5:] = False
    late = real.flip(1)  # padded at the left, where tokens see nothing
    samples = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    masks = {
        "causal": causal.expand(2, 1, 9, 9),
        "padded": (causal & real[:, None])[:, None],
        "padded at the left": (causal & late[:, None])[:, None],
        "padded, window": (causal & ~causal.tril(-3) & real[:, None])[:, None],
        "packed": (causal & (samples == samples[:, None]))[None, None],
        "window": (causal & ~causal.tril(-3))[None, None],
        "both directions": real[:, None, None].expand(2, 1, 9, 9),
        "after a cache": torch.ones(4, 9).tril(5).bool()[None, None],
    }
    for name, mask in masks.items():
        spans = spans_of(mask)
        assert spans is not None, name
        assert torch.equal(mask_of(spans, *mask.shape[2:], mask.device).expand_as(mask), mask), name
    for name, mask in masks.items():
        for lowest in (-torch.inf, torch.finfo(torch.float32).min):
            added = torch.zeros(mask.shape).masked_fill(~mask, lowest)
            spans = spans_of(added)
            if not mask.any(-1).all():
                assert spans is None  # what sees nothing sees all keys alike where numbers are added
            else:
                assert torch.equal(spans, spans_of(mask.clone())), name
    assert spans_of(masks["causal"]).shape[0] == 1 and spans_of(masks["padded"]).shape[0] == 2


def test_what_is_no_stretch_stays_a_mask():
    causal = _causal(9)
    gap, hole = causal.clone(), causal.clone()
    gap[8, 4] = False
    hole[4] = False
    masks = {
        "nothing between others' stretches": hole[None, None],
        "gap": gap[None, None],
        "falls back": causal.flip(0)[None, None],
        "a bias": torch.zeros(1, 1, 9, 9).masked_fill(~causal, -4.0),
        "a bias that trains": torch.zeros(1, 1, 9, 9, requires_grad=True),
        "whole numbers": torch.zeros(1, 1, 9, 9).long(),
        "per head": causal.expand(2, 3, 9, 9),
        "flat": causal,
    }
    for name, mask in masks.items():
        assert spans_of(mask) is None, name


def test_a_mask_that_is_changed_is_looked_at_again():
    mask = _causal(6)[None, None].clone()
    before = spans_of(mask)
    assert spans_of(mask) is before
    mask[..., 3, 1] = False
    assert spans_of(mask) is None
    mask[..., 3, 1] = True
    assert torch.equal(spans_of(mask), before)


def _batch(how):
    batch = {key: text_batch(0)[key] for key in ("input_ids", "labels")}
    tokens = batch["input_ids"].shape[1]
    if how == "padded":
        mask = torch.ones_like(batch["input_ids"])
        mask[1, 6:] = 0
        return batch | {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
    if how == "packed":
        at = torch.arange(tokens)
        return batch | {"position_ids": torch.where(at < 5, at, at - 5).expand_as(batch["input_ids"])}
    return batch


def _step(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["plain", "padded", "packed"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_fused_blocks_take_our_attention(name, how, monkeypatch):
    """Loss and gradients are those of torch's attention with the same mask, and ours is what ran."""
    model = BY_NAME[name].build()
    model.set_attn_implementation("sdpa")
    tuned = inlay.tune(model, inlay.LoRA(r=2)).train()
    tuned.set_padding_free(False)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    calls = []

    def counted(*args):
        calls.append(args)
        return own(*args)

    own = fused.attention
    monkeypatch.setattr(fused, "attention", counted)
    loss, ours = _step(tuned, _batch(how))
    assert len(calls) == model.config.num_hidden_layers
    assert all((args[4] is None) == (how == "plain" and name != "mistral") for args in calls)
    monkeypatch.setattr(fused, "has_own_kernel", lambda q: False)
    wanted_loss, wanted = _step(tuned, _batch(how))
    assert len(calls) == model.config.num_hidden_layers
    assert_close(loss, wanted_loss, atol=1e-5, what="loss")
    assert ours.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert_close(ours[key], gradient, atol=1e-5, what=key)
