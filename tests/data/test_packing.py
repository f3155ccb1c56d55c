"""Several samples in a row: no sample sees another, and the loss is that of the samples on their own."""

from __future__ import annotations

import pytest
import torch
from toys import build_model, build_tokenizer
from transformers import AttentionInterface, BertConfig, BertLMHeadModel

import inlay
from inlay.data import Collator, check_samples_stay_apart, prepare
from inlay.data.packing import join, plan_rows

RECORDS = [{"text": "the cat sat on the mat " * count} for count in (1, 3, 2, 5, 1, 4, 2, 1)]


def test_rows_are_full_and_hold_every_sample_once():
    lengths = [7, 3, 10, 2, 5, 5, 1, 9]
    rows = plan_rows(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(8))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert len(rows) == 5  # 42 tokens in rows of 10: no plan needs fewer
    assert rows == plan_rows(lengths, 10)
    with pytest.raises(ValueError, match="at most 9 tokens to pack, got one of 10"):
        plan_rows(lengths, 9)


def test_positions_restart_and_first_tokens_are_not_supervised():
    row = join([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}])
    assert row == {
        "input_ids": [5, 6, 7, 8, 9],
        "labels": [-100, 6, 7, -100, 9],
        "position_ids": [0, 1, 2, 0, 1],
    }


def summed_loss(model, collator, samples):
    """Loss summed over supervised tokens, and their number."""
    batch = collator(samples)
    count = int((batch["labels"][:, 1:] != -100).sum())
    return model(**batch).loss.item() * count, count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_loss_is_that_of_the_samples_on_their_own(attention, fused):
    tokenizer = build_tokenizer()
    data = prepare(RECORDS, tokenizer)
    packed = data.pack(64)
    assert packed.packed and packed.report.rows == len(packed) < len(data) and "packed rows" in str(packed.report)
    assert packed.lengths == [len(row["input_ids"]) for row in packed.samples] and max(packed.lengths) <= 64
    model = build_model(attn_implementation=attention).double()
    model = inlay.tune(model, inlay.S2FT(ratio=0.3), fused_blocks=fused, fused_loss=fused).train()
    collator = Collator.for_model(model, tokenizer)
    alone = [summed_loss(model, collator, [sample]) for sample in data.samples]
    rows = summed_loss(model, collator, [packed[i] for i in range(len(packed))])
    assert rows == (pytest.approx(sum(loss for loss, _ in alone), rel=1e-6), sum(count for _, count in alone))


def test_a_model_that_keeps_samples_apart_passes():
    model = build_model().train()
    check_samples_stay_apart(model)
    check_samples_stay_apart(inlay.tune(model, inlay.S2FT(ratio=0.3), base="nf4"))
    assert model.training
    check_samples_stay_apart(build_model().bfloat16())


def mixing(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention that knows no masks but the causal one, as a kernel of the user's might."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def test_an_attention_that_mixes_samples_is_refused():
    AttentionInterface.register("mixing", mixing)
    model = build_model()
    model.set_attn_implementation("mixing")
    with pytest.raises(ValueError, match="with 'mixing' attention lets packed samples see each other"):
        check_samples_stay_apart(model)


def test_a_bidirectional_model_is_refused():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(ValueError, match="lets packed samples see each other"):
        check_samples_stay_apart(BertLMHeadModel(config))
