import torch
from toys import build_model, build_tokenizer
from transformers import BertConfig, BertForMaskedLM

from inlay.data import Collator
from inlay.data.collate import count_padding, needs_attention_mask

SAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": list(range(10, 21)), "labels": [-100] * 5 + list(range(15, 21))},
]


def test_right_padding_to_a_multiple_of_eight():
    batch = Collator(pad_token_id=2)(SAMPLES)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [5, 6, 7] + [2] * 13
    assert batch["labels"][0].tolist() == [-100, 6, 7] + [-100] * 13
    assert "attention_mask" not in batch
    assert count_padding(batch["input_ids"], batch["labels"], 2) == 13 + 5


def test_a_supervised_pad_token_is_not_padding():
    # Many tokenizers pad with EOS, and the supervised EOS must not be counted.
    batch = Collator(pad_token_id=2)([{"input_ids": [5, 2], "labels": [-100, 2]}])
    assert count_padding(batch["input_ids"], batch["labels"], 2) == 6


def test_leaving_the_mask_out_changes_no_loss_and_no_logit():
    model = build_model().eval()
    plain, masked = Collator(2)(SAMPLES), Collator(2, attention_mask=True)(SAMPLES)
    assert masked["attention_mask"].sum().item() == 3 + 11
    with torch.no_grad():
        a, b = model(**plain), model(**masked)
    torch.testing.assert_close(a.loss, b.loss)
    real = masked["attention_mask"].bool()
    torch.testing.assert_close(a.logits[real], b.logits[real])


def test_only_causal_language_models_go_without_a_mask():
    assert not needs_attention_mask(build_model())
    tiny = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    assert needs_attention_mask(BertForMaskedLM(tiny))
    routed = build_model()
    routed.config.output_router_logits = True
    assert needs_attention_mask(routed)


def test_a_tokenizer_without_a_pad_token_pads_with_eos():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    assert Collator.for_model(build_model(), tokenizer).pad_token_id == tokenizer.eos_token_id
