"""Data that a model has no rows or positions for is refused before training; data that it has room for never is."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf
from toys import CHATML, build_model, build_tokenizer, turns

import inlay
from inlay.data import Collator, DataReport, TrainingData, prepare
from inlay.data.room import embedding_rows, head_rows, made_for, plain_tokens, text_config
from inlay.train.fits import check_data_fits, warn_if_generation_goes_on

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
HALF = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 64}
LLAMA = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 512}

#: Tables of 20 positions: learned, with rows before the first, sinusoidal, in a buffer, of the size of a bias.
POSITIONS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=20)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=20)
    ),
    "bart": lambda: hf.BartForCausalLM(hf.BartConfig(**HALF, max_position_embeddings=20)),
    "marian": lambda: hf.MarianForCausalLM(hf.MarianConfig(**HALF, max_position_embeddings=20, pad_token_id=0)),
    "gptj": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=20, rotary_dim=8)
    ),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=20, vocab_size=64)),
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            vocab_size=64,
            hidden_size=32,
            num_layers=1,
            num_heads=2,
            attention_types=[[["global"], 1]],
            max_position_embeddings=20,
        )
    ),
}


def data_of(*lengths, token=5, counted=True):
    samples = [{"input_ids": [token] * length, "labels": [token] * length} for length in lengths]
    report = DataReport("tokenized", len(samples), samples=len(samples))
    if counted:
        report.longest, report.highest_token = max(lengths), token
    return TrainingData(samples, report)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_beyond_the_model(kind, counted):
    model = POSITIONS[kind]().train()
    check_data_fits(model, data_of(20, counted=counted))
    assert model.training
    with pytest.raises(
        ValueError, match=r"at most 20 tokens.*one of 21; pass max_length=20 \(the first such is sample 1"
    ):
        check_data_fits(model, data_of(4, 21, 21, counted=counted))
    with torch.no_grad(), pytest.raises(Exception):  # noqa: B017 - each kind fails in its own way: that it does is the point
        model(input_ids=torch.full((1, 21), 5), use_cache=False)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bart"])
@pytest.mark.filterwarnings("ignore")
def test_padding_stays_below_the_last_position(kind):
    """20 is no multiple of 8: a batch padded to 24 would look for positions that are not there."""
    model = POSITIONS[kind]()
    options = {
        "max_steps": 1,
        "disable_tqdm": True,
        "method": inlay.LoRA(r=2, target_modules=r".*(self_attn.q_proj|c_attn)"),
    }
    records = [{"input_ids": list(range(3, 23))}, {"input_ids": [5, 6, 7]}]
    tokenizer = build_tokenizer()
    tokenizer.pad_token_id, tokenizer.eos_token = 2, "<|im_end|>"
    result = inlay.finetune(model, tokenizer, records, per_device_train_batch_size=2, **options)
    assert result.steps == 1


def test_a_tower_of_few_patches_does_not_bound_the_text():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision), text_config=hf.LlamaConfig(**LLAMA), image_token_index=63
    )
    model = hf.LlavaForConditionalGeneration(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_data_fits(model, data_of(200))
    assert text_config(model).vocab_size == embedding_rows(model) == head_rows(model) == 64 and made_for(model) == 512
    assert 63 not in plain_tokens(model, (4096,), torch.Generator().manual_seed(0))  # it stands for an image
    with pytest.raises(ValueError, match="sample 0: wanted token ids below 64"):
        check_data_fits(model, data_of(4, token=64))


def test_types_of_tokens_and_vocabularies_are_no_positions():
    config = hf.BertConfig(
        **SMALL, intermediate_size=32, max_position_embeddings=20, type_vocab_size=3, is_decoder=True
    )
    model = hf.BertLMHeadModel(config)
    assert check_data_fits(model, data_of(20)) == 20
    with pytest.raises(ValueError, match="at most 20 tokens"):
        check_data_fits(model, data_of(21))
    assert check_data_fits(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), data_of(500)) is None


@pytest.mark.parametrize("counted", [True, False])
def test_labels_beyond_a_head_that_is_smaller_than_the_embeddings(counted):
    model = build_model(64)
    model.lm_head = torch.nn.Linear(32, 60, bias=False)
    held = [data_of(4, token=59, counted=counted), data_of(4, token=62, counted=counted)]
    check_data_fits(model, held[0])
    with pytest.raises(ValueError, match="sample 0: wanted token ids below 60, .*head, got 62 as a label"):
        check_data_fits(model, held[1])
    for sample in held[1].samples:
        sample["labels"] = [-100, 5, 5, 5]
    check_data_fits(model, held[1])  # a token that nothing is to predict needs a row in the embeddings alone


def test_samples_made_by_hand_are_counted():
    for key, token, wanted in (
        ("input_ids", 64, "below 64"),
        ("input_ids", -1, "at least 0"),
        ("labels", -1, "at least"),
    ):
        data = data_of(4, 4, counted=False)
        data.samples[1][key] = [5, token, 5, 5]
        with pytest.raises(ValueError, match=f"sample 1: wanted token ids (of )?{wanted}"):
            check_data_fits(build_model(64), data)


def test_a_pad_token_that_the_model_has_no_row_for_is_not_padded_with():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = build_model(len(tokenizer) - 1)
    assert tokenizer.pad_token_id == embedding_rows(model)
    collator = Collator.for_model(model, tokenizer)
    batch = collator([{"input_ids": [5] * 3, "labels": [5] * 3}])
    assert collator.pad_token_id == tokenizer.eos_token_id and batch["input_ids"].shape == (1, 8)
    assert model(**batch).loss.isfinite()
    assert Collator.for_model(build_model(len(tokenizer)), tokenizer).pad_token_id == tokenizer.pad_token_id


def test_a_quantized_head_and_embedding_count_tokens_not_bytes():
    model = inlay.tune(build_model(64), inlay.LoRA(r=2), base="nf4")
    assert embedding_rows(model) == head_rows(model) == 64


def test_an_end_of_turn_at_which_generation_goes_on_is_said():
    tokenizer = build_tokenizer(CHATML.replace("<|im_end|>", "<|im_start|>"))
    data = prepare([{"messages": turns("hi", "cat")}], tokenizer)
    model = build_model()
    with pytest.warns(UserWarning, match=r"turns end in '<\|im_start\|>' \(0\), at which generation does not stop"):
        warn_if_generation_goes_on(model, tokenizer, data)
    model.generation_config.eos_token_id = [0, 2]
    other = build_tokenizer(CHATML)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_generation_goes_on(model, tokenizer, data)
        warn_if_generation_goes_on(build_model(), other, prepare([{"messages": turns("hi", "cat")}], other))
        warn_if_generation_goes_on(build_model(), other, data_of(4))
