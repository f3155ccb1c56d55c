"""An unmodified SFTTrainer on models that inlay tuned, and on its PEFT configs."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
from comparing import assert_close, assert_equal
from families import BY_NAME, eval_logits, llama, perturb, prompt
from torch import nn
from toys import build_model, build_tokenizer, turns
from transformers import TrainerCallback
from transformers.modeling_utils import AttentionInterface

import inlay
from inlay.bases import BaseConfig, quantize_linears
from inlay.nn.tuned_linear import TunedLinear

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
from inlay.integrations.peft import S2FTConfig, accelerate_lora  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
IGNORED = -100
PAIRS = [
    {"prompt": "hello there, the cat", "completion": " sat on the mat"},
    {"prompt": "the mat", "completion": " sat there, hello hello the cat sat"},
    {"prompt": "user answer", "completion": " system"},
    {"prompt": "on the", "completion": " cat the cat the cat"},
] * 3
CHAT = [{"messages": turns("hello there", "the cat sat", "on the mat", "hello")}] * 4
#: With generation markers, which TRL's assistant_only_loss reads.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def base(**changes):
    return perturb(build_model(num_hidden_layers=3, **changes))


def quantized():
    model = base()
    quantize_linears(model, BaseConfig("nf4"))
    return model


def lora_config():
    return accelerate_lora(peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


#: What a user passes: a model, and a peft_config or None.
WAYS = {
    "tune-s2ft": lambda: (inlay.tune(base(), inlay.S2FT(ratio=0.2)), None),
    "tune-lora": lambda: (inlay.tune(base(), inlay.LoRA(r=4, lora_alpha=8)), None),
    "tune-s2ft-nf4": lambda: (inlay.tune(base(), inlay.S2FT(ratio=0.2), base="nf4"), None),
    "tune-full": lambda: (inlay.tune(base(), inlay.Full()), None),
    "tune-lisa": lambda: (inlay.tune(base(), inlay.LISA(layers=1, every=1)), None),
    "tune-hft": lambda: (inlay.tune(base(), inlay.HFT(redraw_every=2)), None),
    "tune-ssf": lambda: (inlay.tune(base(), inlay.SSF()), None),
    "tune-lora-nf4": lambda: (inlay.tune(base(), inlay.LoRA(r=4, lora_alpha=8), base="nf4"), None),
    "peft-s2ft": lambda: (base(), S2FTConfig(ratio=0.2)),
    "peft-lora": lambda: (base(), lora_config()),
    "peft-s2ft-nf4": lambda: (quantized(), S2FTConfig(ratio=0.2)),
    "peft-lora-nf4": lambda: (quantized(), lora_config()),
}
MAIN_WAYS = ["tune-s2ft", "peft-s2ft", "peft-lora"]


def sft(model, directory, data=None, peft_config=None, eval_data=None, template=None, **changes):
    arguments = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**(arguments | changes)),
        train_dataset=datasets.Dataset.from_list(PAIRS if data is None else data),
        eval_dataset=None if eval_data is None else datasets.Dataset.from_list(eval_data),
        processing_class=build_tokenizer(template),
        peft_config=peft_config,
    )


def run(way, directory, data=None, **changes):
    model, config = WAYS[way]()
    trainer = sft(model, directory, data, peft_config=config, **changes)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainables(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def wanted_loss(model, trainer, count=2):
    """The loss of the first samples as transformers' plain model computes it."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(count)])
    with torch.no_grad():
        return float(model(**batch).loss)


# --- it trains, on the right loss -----------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_trains(way, tmp_path):
    """The loss falls, only fp32 trainables change, and the first loss is that of the plain model."""
    model, config = WAYS[way]()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad or config}
    steps = 40 if way == "tune-ssf" else 10  # vectors learn as far, by smaller steps
    trainer = sft(model, tmp_path, PAIRS[:2] * 12, peft_config=config, max_steps=steps)
    first = wanted_loss(quantized() if way.endswith("nf4") else base(), trainer)
    trainer.train()
    series = losses(trainer)
    assert_close(torch.tensor(series[0]), torch.tensor(first), atol=2e-4, what="first loss")
    assert series[-1] < 0.8 * series[0]
    assert trainables(trainer) and {p.dtype for p in trainables(trainer).values()} == {torch.float32}
    after = {name.replace(".base_layer.", "."): p for name, p in trainer.model.named_parameters()}
    for name, value in before.items():
        assert_equal(after.get(name, after.get(f"base_model.model.{name}")), value, name)


def test_completion_and_assistant_only_loss(tmp_path):
    """Supervised are the completions, or the assistant's turns, alone."""
    for data, options, prompts in (
        (PAIRS[:2], {}, False),
        (CHAT[:2], {"assistant_only_loss": True}, False),
        (CHAT[:2], {}, True),
    ):
        trainer = sft(WAYS["tune-s2ft"]()[0], tmp_path, data, template=TEMPLATE, max_steps=1, **options)
        labels = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])["labels"]
        text = trainer.processing_class.decode(labels[0][labels[0] != IGNORED])
        assert text and ("hello there" in text) == prompts
        wanted = wanted_loss(base(), trainer)
        trainer.train()
        assert_close(torch.tensor(losses(trainer)[0]), torch.tensor(wanted), atol=2e-4, what=text)


@pytest.mark.parametrize("way", MAIN_WAYS)
def test_accumulation_equals_a_larger_batch(way, tmp_path):
    runs = [
        run(way, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        for size, steps in ((4, 1), (2, 2), (1, 4))
    ]
    assert len(set(losses(runs[0]))) == 4
    for other in runs[1:]:
        assert_close(torch.tensor(losses(other)), torch.tensor(losses(runs[0])), atol=2e-4, what="losses")
        for name, value in trainables(runs[0]).items():
            assert_close(trainables(other)[name], value, atol=2e-5, what=name)


@pytest.mark.parametrize("way", ["tune-s2ft", "tune-s2ft-nf4", "peft-s2ft", "peft-lora"])
def test_bf16_autocast(way, tmp_path):
    trainer = run(way, tmp_path, PAIRS[:2] * 12, bf16=True, max_steps=10)
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    assert {p.dtype for p in trainables(trainer).values()} == {torch.float32}


# --- gradient checkpointing -----------------------------------------------------------------------------


class Counter:
    """How often the block ``index`` of a model runs."""

    def __init__(self, model, index):
        self.calls = 0
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        plain.model.layers[index].mlp.up_proj.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", ["tune", "peft"])
def test_checkpointing_stays_partial(way, reentrant, tmp_path):
    """Only the trained layer and those above are recomputed; losses and values stay."""
    layers = {"layers_to_transform": [1], "ratio": 0.2}

    def start(**options):
        model = base()
        config = S2FTConfig(**layers) if way == "peft" else None
        model = model if config else inlay.tune(model, inlay.S2FT(**layers))
        trainer = sft(model, tmp_path, peft_config=config, max_steps=2, **options)
        counters = [Counter(trainer.model, index) for index in range(3)]
        trainer.train()
        return trainer, [counter.calls for counter in counters]

    plain, calls = start()
    assert calls == [2, 2, 2]
    kwargs = {"use_reentrant": reentrant}
    recomputed, calls = start(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert calls == [2, 4, 4]
    assert_close(torch.tensor(losses(recomputed)), torch.tensor(losses(plain)), atol=1e-4, what="losses")
    for name, value in trainables(plain).items():
        assert_close(trainables(recomputed)[name], value, atol=1e-5, what=name)


# --- checkpoints ----------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


@pytest.mark.parametrize("way", ["tune-s2ft", "tune-lora", "peft-s2ft", "peft-lora"])
def test_resume_is_exact(way, tmp_path):
    whole = run(way, tmp_path / "whole")
    model, config = WAYS[way]()
    first = sft(model, tmp_path / "part", peft_config=config, save_strategy="steps", save_steps=2)
    first.add_callback(Stop())
    first.train()
    model, config = WAYS[way]()
    second = sft(model, tmp_path / "part", peft_config=config)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(whole) and len(set(losses(whole))) == 4
    for name, value in trainables(whole).items():
        assert_equal(trainables(second)[name], value, name)


@pytest.mark.parametrize("way", ["tune-s2ft", "peft-s2ft"])
def test_the_best_checkpoint_is_loaded_at_the_end(way, tmp_path):
    """Best is called what has the largest loss, so that it is not the last step."""
    model, config = WAYS[way]()
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = sft(model, tmp_path, PAIRS[:2] * 6, config, PAIRS[:2], max_steps=3, learning_rate=0.02, **every, **best)
    trainer.train()
    history = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    step = max(history, key=history.get)
    assert step != 3
    assert trainer.evaluate()["eval_loss"] == history[step]
    checkpoint = tmp_path / f"checkpoint-{step}"
    loaded = inlay.load(base(), checkpoint) if config is None else peft.PeftModel.from_pretrained(base(), checkpoint)
    batch = {"input_ids": prompt()}
    assert_close(eval_logits(loaded, batch), eval_logits(trainer.model, batch), atol=1e-5)


# --- what TRL does with the loss ------------------------------------------------------------------------


def test_which_loss_ran_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "inlay"):
        trainer = run("tune-s2ft", tmp_path, max_steps=2)
    said = [record.message for record in caplog.records if "loss: TRL's own" in record.message]
    assert len(said) == 1
    assert trainer.model._loss_function.last is None, "inlay's fused loss ran after all"


@pytest.mark.parametrize("way", ["tune", "peft"])
def test_a_delta_on_the_output_head_is_refused(way, tmp_path):
    """TRL reads the head's weight without calling it: the delta would not train, and nobody would know."""
    targets = {"target_modules": ["lm_head", "down_proj"], "ratio": 0.2}
    if way == "tune":
        model = inlay.tune(base(), inlay.S2FT(**targets), fused_loss=False)
        assert isinstance(model.lm_head, TunedLinear)
        with pytest.raises(ValueError, match="TRL computes the loss from lm_head.weight"):
            sft(model, tmp_path).train()
    else:
        with pytest.raises(ValueError, match="lm_head"):
            sft(base(), tmp_path, peft_config=S2FTConfig(**targets))


# --- packing --------------------------------------------------------------------------------------------

PACKED = {"packing": True, "per_device_train_batch_size": 1, "max_steps": 1, "max_length": 128}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("way", ["tune", "peft"])
def test_packed_samples_do_not_see_each_other(way, attention, tmp_path):
    """All samples in one row give the loss and the step of all samples in rows of their own."""

    def start(**options):
        model = base()
        model.set_attn_implementation(attention)
        config = S2FTConfig(ratio=0.2) if way == "peft" else None
        model = model if config else inlay.tune(model, inlay.S2FT(ratio=0.2))
        trainer = sft(model, tmp_path, PAIRS[:4], peft_config=config, **options)
        trainer.train()
        return trainer

    packed, apart = start(**PACKED), start(per_device_train_batch_size=4, max_steps=1)
    assert len(packed.train_dataset) == 1 and len(packed.train_dataset[0]["seq_lengths"]) == 4
    assert_close(torch.tensor(losses(packed)), torch.tensor(losses(apart)), atol=2e-4, what="loss")
    for name, value in trainables(apart).items():
        assert_close(trainables(packed)[name], value, atol=1e-5, what=name)


def blind_attention(module, query, key, value, attention_mask, **kwargs):
    """Causal over the whole row, whatever is packed into it."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None


@pytest.fixture
def blind():
    AttentionInterface.register("blind", blind_attention)
    yield "blind"
    AttentionInterface._global_mapping.pop("blind")


@pytest.mark.parametrize("way", ["tune", "peft"])
def test_packing_is_refused_where_attention_cannot_separate(way, blind, tmp_path):
    model = base()
    model.set_attn_implementation(blind)
    config = S2FTConfig(ratio=0.2) if way == "peft" else None
    model = model if config else inlay.tune(model, inlay.S2FT(ratio=0.2))
    trainer = sft(model, tmp_path, peft_config=config, **PACKED)
    with pytest.raises(ValueError, match="lets packed samples see each other"):
        trainer.train()


def test_a_flat_mask_beside_packed_positions_is_refused():
    """transformers then takes the row for one sample. Padding, and positions that go on, are no packing."""
    model = inlay.tune(llama(), inlay.S2FT(ratio=0.2))
    ids, ones = prompt(tokens=4), torch.ones(1, 4, dtype=torch.int64)
    positions = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="two-dimensional attention_mask"):
        model(input_ids=ids, position_ids=positions, attention_mask=ones)
    model(input_ids=ids, position_ids=positions)
    model(input_ids=ids, position_ids=positions, attention_mask=torch.tensor([[1, 1, 0, 0]]))
    model(input_ids=ids, position_ids=torch.tensor([[1, 1, 0, 1]]), attention_mask=torch.tensor([[0, 0, 1, 1]]))
    model(input_ids=ids, position_ids=torch.arange(4)[None], attention_mask=ones)
    model.eval()(input_ids=ids, position_ids=positions, attention_mask=ones)


def test_a_model_that_packs_wrongly_is_refused():
    """transformers' OPT makes its mask without the positions: packed samples see each other, with any trainer."""
    ids, positions = prompt(tokens=4), torch.tensor([[0, 1, 0, 1]])
    opt = inlay.tune(BY_NAME["opt"].build(), inlay.S2FT(ratio=0.2))
    opt.model.decoder.layers[0].eval()
    with pytest.raises(ValueError, match="lets packed samples see each other"):
        opt(input_ids=ids, position_ids=positions)
    assert opt.training and not opt.model.decoder.layers[0].training


# --- the example ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [[], ["--method", "lora", "--base", "nf4"], ["--method", "peft-s2ft", "--packing"], ["--method", "peft-lora"]],
    ids=lambda options: "-".join(options).replace("--", "") or "s2ft",
)
def test_the_example_runs(options, tmp_path):
    spec = importlib.util.spec_from_file_location("sft_trainer_example", ROOT / "examples" / "sft_trainer.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    base().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    paths = ["--model", str(tmp_path / "model"), "--data", str(data), "--output", str(tmp_path / "out")]
    trainer = example.main([*paths, "--max-steps", "6", "--dtype", "float32", "--learning-rate", "5e-3", *options])
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}
    if not options:
        loaded = inlay.load(base(), tmp_path / "out")
        batch = {"input_ids": prompt()}
        assert_equal(eval_logits(loaded, batch), eval_logits(trainer.model, batch), "logits")
