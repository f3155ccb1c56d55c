import json

import pytest
import torch
from toys import CHATML, build_model, build_tokenizer

import inlay
from inlay.data import prepare
from inlay.train import finetune

WORDS = ["cat", "mat", "hello", "there", "sat", "user", "system", "answer", "the", "on"]
RECORDS = [{"prompt": f"{word}:", "completion": f" {word[::-1]}"} for word in WORDS]
METHOD = inlay.S2FT(ratio=0.25)
QUICK = {"per_device_train_batch_size": 5, "max_steps": 4, "learning_rate": 1e-2, "disable_tqdm": True}


def tuned():
    return inlay.tune(build_model(), METHOD)


def trainables(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_trains_measures_and_prints(capsys):
    model = tuned()
    before = model.state_dict()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    result = finetune(model, build_tokenizer(), RECORDS, **(QUICK | {"max_steps": 20, "learning_rate": 0.1}))
    assert len(result.losses) == result.steps == 20 and result.losses[-1] < result.losses[0] - 0.2
    assert result.tokens_per_second > 0 and 0 < result.padding_fraction < 1 and result.output_dir is None
    assert result.peak_memory_bytes is None or result.peak_memory_bytes >= 0
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)
    out = capsys.readouterr().out
    assert "cat:[[  tac<|im_end|> ]]" in out and "loss on completions only" in out
    assert "trainable params:" in out and "tokens/s" in out and "padding" in out
    assert "(estimated for this run: " in out and result.expected_memory_bytes > 0


def test_a_run_does_not_fail_for_want_of_an_estimate(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise NotImplementedError("its step cannot be run\non shapes alone")

    monkeypatch.setattr("inlay.train.expected.estimate", refuse)
    result = finetune(tuned(), build_tokenizer(), RECORDS, **(QUICK | {"max_steps": 1}))
    out = capsys.readouterr().out
    assert "inlay: no estimate of memory: its step cannot be run on shapes alone" in out
    assert result.expected_memory_bytes is None and "(estimated" not in out


def test_padding_and_tokens_are_counted_exactly():
    tokenizer = build_tokenizer()
    data = prepare(RECORDS, tokenizer)
    lengths = [len(sample["input_ids"]) for sample in data.samples]
    assert 8 < max(lengths) <= 16  # one batch of 10 x 16
    for padding_free, computed in ((False, 160), ("auto", -(-sum(lengths) // 8) * 8)):
        options = {"per_device_train_batch_size": 10, "max_steps": 1, "disable_tqdm": True}
        result = finetune(tuned(), tokenizer, data, padding_free=padding_free, **options)
        assert result.padding_fraction == pytest.approx(1 - sum(lengths) / computed)
        assert result.tokens_per_second * result.seconds == pytest.approx(sum(lengths))


def test_without_padding_a_run_is_the_same(capsys, tmp_path):
    """Losses and weights of steps of two batches each, and the loss on held-out records."""
    options = QUICK | {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 6}
    options |= {"train_sampling_strategy": "group_by_length", "eval_data": RECORDS[:4], "per_device_eval_batch_size": 3}
    padded, free = tuned(), tuned()
    runs = [
        finetune(model, build_tokenizer(), RECORDS, padding_free=mode, **options)
        for model, mode in ((padded, False), (free, "auto"))
    ]
    out = capsys.readouterr().out
    assert "padding: stays: padding_free=False" in out
    assert "padding: dropped: samples run by their lengths in one row" in out
    assert runs[1].padding_fraction < 0.5 * runs[0].padding_fraction
    assert runs[0].losses == pytest.approx(runs[1].losses, abs=1e-4)
    assert runs[0].eval_losses == pytest.approx(runs[1].eval_losses, abs=1e-4)
    for (name, a), b in zip(trainables(padded).items(), trainables(free).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=name)


def test_padding_stays_where_something_minds_and_true_refuses(capsys):
    quick = QUICK | {"max_steps": 1}
    finetune(tuned(), build_tokenizer(), RECORDS, neftune_noise_alpha=5.0, **quick)
    assert "padding: stays, because of neftune_noise_alpha" in capsys.readouterr().out
    kept = tuned()
    for mode in (False, "auto"):
        kept.set_padding_free(mode)
        finetune(kept, build_tokenizer(), RECORDS, **quick)
        assert ("padding: stays: padding_free=False" in capsys.readouterr().out) == (mode is False)
        finetune(kept, build_tokenizer(), RECORDS, neftune_noise_alpha=5.0, padding_free="auto", **quick)
        assert kept.inlay_state.padding_free.mode == mode, "a run leaves the model's own setting"
        capsys.readouterr()
    with pytest.raises(ValueError, match="padding_free=True: rows of another shape do not go with neftune"):
        finetune(tuned(), build_tokenizer(), RECORDS, neftune_noise_alpha=5.0, padding_free=True, **quick)
    model = tuned()
    model.model.layers[0].register_forward_hook(lambda m, args, y: None)
    result = finetune(model, build_tokenizer(), RECORDS, **quick)
    assert "padding: stays: a hook on model.layers.0 sees hidden states" in capsys.readouterr().out
    assert result.padding_fraction > 0.1
    finetune(tuned(), build_tokenizer(), RECORDS, packing=True, **quick)
    assert "padding: none: rows are packed" in capsys.readouterr().out


def test_a_method_tunes_a_plain_model():
    model = build_model()
    finetune(model, build_tokenizer(), RECORDS, method=METHOD, **(QUICK | {"max_steps": 1}))
    assert trainables(model)


def test_eval_data_is_evaluated():
    quick = QUICK | {"max_steps": 2}
    tokenizer = build_tokenizer()
    once = finetune(tuned(), tokenizer, RECORDS[:5], eval_data=RECORDS[5:], **quick)
    assert list(once.eval_losses) == [2]
    each = finetune(
        tuned(), tokenizer, RECORDS[:5], eval_data=RECORDS[5:], eval_strategy="steps", eval_steps=1, **quick
    )
    assert list(each.eval_losses) == [1, 2] and each.eval_losses[2] == pytest.approx(once.eval_losses[2])


def test_micro_batches_equal_one_batch():
    # Samples of different length: a mean of means would differ.
    whole, parts = tuned(), tuned()
    one = finetune(whole, build_tokenizer(), RECORDS, **(QUICK | {"per_device_train_batch_size": 10}))
    accumulated = QUICK | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5}
    many = finetune(parts, build_tokenizer(), RECORDS, **accumulated)
    assert one.losses == pytest.approx(many.losses, abs=1e-4)
    for (name, a), b in zip(trainables(whole).items(), trainables(parts).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=name)


def test_eight_bit_states_are_ours(tmp_path, monkeypatch):
    made = []
    init = inlay.optim.AdamW8bit.__init__
    monkeypatch.setattr(
        inlay.optim.AdamW8bit,
        "__init__",
        lambda self, *args, **options: (made.append(self), init(self, *args, **options))[1],
    )
    result = finetune(tuned(), build_tokenizer(), RECORDS, optim="adamw_8bit", **(QUICK | {"max_steps": 20}))
    assert len(made) == 1 and result.losses[-1] < result.losses[0]


def test_packing_trains_on_the_same_tokens_with_less_padding(tmp_path):
    records = [{"prompt": f"{word}:", "completion": f" {word[::-1]}" * count} for count, word in enumerate(WORDS, 1)]
    options = QUICK | {"per_device_train_batch_size": 2, "max_steps": 6, "max_length": 64}
    plain = finetune(tuned(), build_tokenizer(), records, padding_free=False, **options)
    folder = tmp_path / "encoded"
    packed = finetune(tuned(), build_tokenizer(), records, packing=True, data_folder=folder, **options)
    assert packed.padding_fraction < plain.padding_fraction / 2
    assert packed.losses[-1] < packed.losses[0]


def test_preflight_runs_the_longest_batch_and_changes_nothing(capsys):
    records = [*RECORDS, {"prompt": "a:", "completion": " the cat sat on the mat" * 4}]
    results = []
    for preflight in (True, False):
        torch.manual_seed(0)
        model = inlay.tune(build_model(), inlay.LoRA(r=2, lora_dropout=0.5))
        results.append(finetune(model, build_tokenizer(), records, preflight=preflight, **QUICK).losses)
    assert results[0] == results[1]
    width = -(-max(len(sample["input_ids"]) for sample in prepare(records, build_tokenizer()).samples) // 8) * 8
    assert f"the longest batch of this run (5 x {width} tokens) fits" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_named_before_the_first_step(monkeypatch):
    model = tuned()

    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(model, "forward", no_room)
    with pytest.raises(RuntimeError, match=r"the longest batch of this run, 5 x 16 tokens, does not fit .* lower"):
        finetune(model, build_tokenizer(), RECORDS, **QUICK)


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_resume_gives_identical_results(tmp_path, sampling):
    # Two steps per epoch: the checkpoint at 3 lies in the middle of the second.
    options = QUICK | {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "train_sampling_strategy": sampling}
    straight = tuned()
    whole = finetune(straight, build_tokenizer(), RECORDS, output_dir=str(tmp_path / "a"), **options)
    resumed = tuned()
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    rest = finetune(
        resumed,
        build_tokenizer(),
        RECORDS,
        output_dir=str(tmp_path / "b"),
        resume_from_checkpoint=checkpoint,
        **options,
    )
    assert rest.losses == whole.losses[3:]
    for (name, a), b in zip(trainables(straight).items(), trainables(resumed).values(), strict=True):
        assert torch.equal(a, b), name


def test_the_output_dir_holds_the_adapter_and_the_record_of_the_run(tmp_path):
    model, tokenizer = tuned(), build_tokenizer()
    result = finetune(model, tokenizer, RECORDS, output_dir=str(tmp_path), save_strategy="no", **QUICK)
    assert result.output_dir == str(tmp_path)
    loaded = inlay.load(build_model(), str(tmp_path))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)
    record = json.loads((tmp_path / "inlay_run.json").read_text())
    assert record["arguments"]["learning_rate"] == 1e-2 and record["data"]["records"] == 10
    assert record["result"]["losses"] == result.losses and len(record["data_sha256"]) == 64


def test_length_grouping_puts_the_longest_sample_first():
    seen = []
    model = tuned()

    def note(_, args, kwargs):
        if model.training:
            seen.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    records = [*RECORDS, {"prompt": "the mat " * 9, "completion": "sat"}]
    finetune(model, build_tokenizer(), records, train_sampling_strategy="group_by_length", preflight=False, **QUICK)
    assert seen[0] == max(seen) > seen[1]


def test_messages_are_trained_through_the_chat_template(capsys):
    turns = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "tac"}]
    finetune(tuned(), build_tokenizer(CHATML), [{"messages": turns}] * 5, **(QUICK | {"max_steps": 1}))
    assert "<|im_start|>assistant\n[[ tac<|im_end|> ]]" in capsys.readouterr().out


def test_a_loss_that_leaves_logits_loses_its_padding_in_finetune_alone():
    from families import BY_NAME

    model = inlay.tune(BY_NAME["granite"].build(), METHOD)
    model.resize_token_embeddings(300)
    result = finetune(model, build_tokenizer(), RECORDS, **(QUICK | {"max_steps": 1}))
    assert result.padding_fraction < 0.2 and model.inlay_state.padding_free.computed  # 7 of 48; 39 of 80 otherwise
    tokens = torch.tensor([[5, 6, 7], [8, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    outputs = model.train()(input_ids=tokens.repeat(8, 1), attention_mask=mask.repeat(8, 1), labels=tokens.repeat(8, 1))
    assert outputs.logits[1, 2].any() and model.inlay_state.padding_free.computed is None
