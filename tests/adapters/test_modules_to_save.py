"""What trains whole beside the deltas: the head of a task model, and what modules_to_save names."""

from __future__ import annotations

import copy
import io
import pickle

import peft
import pytest
import torch
import transformers
from comparing import assert_close, assert_equal, assert_state_equal, max_diff
from families import _LLAMA, BY_NAME, class_batch, eval_logits, llama, perturb, text_batch
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay.bases import QuantizedLinear
from inlay.nn.whole import whole_tensors

METHODS = {"s2ft": inlay.S2FT(ratio=0.2), "lora": inlay.LoRA(r=4), "in place": inlay.S2FT(ratio=0.2, update="in_place")}


def classifier(seed: int = 0, labels: int = 3, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    config = transformers.LlamaConfig(**(_LLAMA | options), num_labels=labels)
    return perturb(transformers.LlamaForSequenceClassification(config), seed).to(dtype)


def with_new_head(model: nn.Module) -> nn.Module:
    """What loading a checkpoint without the head gives: the same base, other random numbers in the head."""
    torch.nn.init.normal_(model.score.weight)
    return model


def train(model: nn.Module, batch=None, steps: int = 4) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**(batch or class_batch(0))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model: nn.Module) -> torch.Tensor:
    return eval_logits(model, class_batch(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_head_trains_and_comes_back(method, dtype, tmp_path):
    plain = classifier(dtype=dtype)
    tuned = train(inlay.tune(copy.deepcopy(plain), method))
    head = tuned.score.weight
    assert head.dtype is torch.float32 and head.requires_grad and max_diff(head, plain.score.weight) > 1e-2
    tuned.save_pretrained(tmp_path)
    loaded = inlay.load(with_new_head(classifier(dtype=dtype)), tmp_path)
    assert_equal(logits(loaded), logits(tuned), "logits")
    assert_state_equal(loaded.state_dict(), tuned.state_dict())
    merged = inlay.merge(loaded)
    assert type(merged.score) is nn.Linear and merged.score.weight.dtype is dtype
    assert_equal(merged.score.weight, head.to(dtype), "merged head")
    assert list(merged.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_head_is_never_quantized(base, tmp_path):
    tuned = train(inlay.tune(classifier(), inlay.S2FT(ratio=0.2), base=base))
    assert isinstance(tuned.model.layers[0].mlp.gate_proj, QuantizedLinear)
    assert not isinstance(tuned.score, QuantizedLinear) and tuned.score.weight.dtype is torch.float32
    tuned.save_pretrained(tmp_path)
    loaded = inlay.load(with_new_head(classifier()), tmp_path, base=base)
    assert_equal(logits(loaded), logits(tuned), "logits")
    config = inlay.BaseConfig(base)
    assert "score" not in config.names(classifier())  # nor while a checkpoint is loaded


def test_a_named_module_is_not_quantized_either():
    method = inlay.LoRA(r=4, modules_to_save=["layers.1.mlp.up_proj"])
    tuned = inlay.tune(llama(), method, base="nf4")
    assert not isinstance(tuned.model.layers[1].mlp.up_proj, QuantizedLinear)
    assert isinstance(tuned.model.layers[0].mlp.up_proj, nn.Linear) and tuned.model.layers[0].mlp.up_proj.deltas


@pytest.mark.parametrize("name", ["norm", "embed_tokens", "lm_head", "layers.0.mlp", "q_norm", "layers.1"])
def test_any_module_by_name(name, tmp_path):
    build = lambda: perturb(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_LLAMA, head_dim=8)))  # noqa: E731
    method = inlay.S2FT(ratio=0.2, modules_to_save=[name])
    before = eval_logits(build(), text_batch(1))
    tuned = inlay.tune(build(), method)
    assert_close(eval_logits(tuned, text_batch(1)), before, atol=2e-5, what="logits before training")
    reference = build().requires_grad_(False)
    keys = list(whole_tensors(tuned, "default"))
    for key in keys:
        reference.get_parameter(key).requires_grad_(True)
    reference(**text_batch(0)).loss.backward()
    tuned(**text_batch(0)).loss.backward()
    for key in keys:
        wanted = reference.get_parameter(key).grad
        assert bool(wanted.any())
        assert_close(tuned.get_parameter(key).grad, wanted, atol=1e-4 * float(wanted.abs().max()), what=key)
    train(tuned, text_batch(0))
    tuned.save_pretrained(tmp_path)
    loaded = inlay.load(build(), tmp_path)
    assert_equal(eval_logits(loaded, text_batch(1)), eval_logits(tuned, text_batch(1)), "logits")
    assert_close(
        eval_logits(inlay.merge(tuned), text_batch(1)), eval_logits(tuned, text_batch(1)), atol=2e-5, what="merged"
    )


def test_tied_embeddings_stay_tied(tmp_path):
    build = lambda: BY_NAME["gemma"].build()  # noqa: E731
    tuned = train(inlay.tune(build(), inlay.LoRA(r=4, modules_to_save=["embed_tokens"])), text_batch(0))
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight
    assert max_diff(tuned.lm_head.weight, build().lm_head.weight) > 1e-2
    tuned.save_pretrained(tmp_path)
    loaded = inlay.load(build(), tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_equal(eval_logits(loaded, text_batch(1)), eval_logits(tuned, text_batch(1)), "logits")
    merged = inlay.merge(loaded)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with inlay.disabled(loaded):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert_close(eval_logits(loaded, text_batch(1)), eval_logits(build(), text_batch(1)), atol=2e-5, what="base")


def test_several_adapters_each_with_its_head(tmp_path):
    plain = classifier()
    tuned = inlay.tune(copy.deepcopy(plain), inlay.S2FT(ratio=0.2), adapter_name="one")
    train(tuned)
    one = logits(tuned)
    inlay.tune(tuned, inlay.LoRA(r=4), adapter_name="two")
    assert_close(logits(tuned), logits(plain), atol=2e-5, what="a new adapter starts from the base's head")
    train(tuned, class_batch(3), 6)
    two = logits(tuned)
    tuned.set_adapter("one")
    assert_equal(logits(tuned), one, "one")
    tuned.set_adapter("two")
    assert_equal(logits(tuned), two, "two")
    assert max_diff(one, two) > 1e-3
    with inlay.disabled(tuned):
        assert_close(logits(tuned), logits(plain), atol=2e-5, what="disabled")
        assert not tuned.score.weight.requires_grad
    assert_equal(logits(tuned), two, "after disabled")
    tuned.disable_adapters()
    assert_close(logits(tuned), logits(plain), atol=2e-5, what="disable_adapters")
    tuned.enable_adapters()
    with pytest.raises(ValueError, match=r"score.weight is trained whole by each of the adapters \['one', 'two'\]"):
        tuned.set_adapter(["one", "two"])
    assert tuned.active_adapters() == ["two"] and torch.equal(logits(tuned), two)
    tuned.delete_adapter("one")
    assert_equal(logits(tuned), two, "after deleting the other")
    tuned.save_pretrained(tmp_path / "two")
    inlay.tune(tuned, inlay.S2FT(ratio=0.2), adapter_name="three")
    tuned.hotswap_adapter(tmp_path / "two", "two")
    tuned.set_adapter("two")
    tuned.delete_adapter("three")
    assert_close(logits(tuned), two, atol=2e-5, what="hotswapped")


def test_hotswap_wants_the_same_tensors(tmp_path):
    tuned = train(inlay.tune(classifier(), inlay.S2FT(ratio=0.2)))
    tuned.save_pretrained(tmp_path)
    other = inlay.tune(classifier(), inlay.S2FT(ratio=0.2, modules_to_save=[]))
    with pytest.raises(ValueError, match="wanted the same tensors trained whole"):
        other.hotswap_adapter(tmp_path)
    same = inlay.tune(with_new_head(classifier()), inlay.S2FT(ratio=0.2))
    held = same.score.weight
    same.hotswap_adapter(tmp_path)
    assert same.score.weight is held
    assert_equal(logits(same), logits(tuned), "logits")


def test_the_weighted_sum_of_heads():
    plain = classifier()
    tuned = train(inlay.tune(copy.deepcopy(plain), inlay.LoRA(r=4), adapter_name="one"))
    train(inlay.tune(tuned, inlay.LoRA(r=4, seed=1), adapter_name="two"), class_batch(3))
    base = plain.score.weight
    one, two = (whole_tensors(tuned, name)["score.weight"].detach().clone() for name in ("one", "two"))
    tuned.add_weighted_adapter(["one", "two"], [0.7, 0.5], "mix")
    tuned.set_adapter("mix")
    assert_close(tuned.score.weight, base + 0.7 * (one - base) + 0.5 * (two - base), atol=1e-6, what="head")


def test_moves_and_copies_take_every_head_along():
    tuned = train(inlay.tune(classifier(dtype=torch.bfloat16), inlay.S2FT(ratio=0.2), adapter_name="one"))
    inlay.tune(tuned, inlay.S2FT(ratio=0.2), adapter_name="two")
    exact = whole_tensors(tuned, "one")["score.weight"].detach().clone()
    tuned.score.to(torch.float16).to(torch.bfloat16)
    assert_equal(whole_tensors(tuned, "one")["score.weight"], exact, "not rounded")
    assert tuned.score.weight.dtype is torch.float32
    for copied in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        copied.set_adapter("one")
        assert_equal(copied.score.weight, exact, "copy")
    buffer = io.BytesIO()
    torch.save(tuned, buffer)
    buffer.seek(0)
    assert_equal(logits(torch.load(buffer, weights_only=False)), logits(tuned), "torch.load")
    tuned.to("meta")
    assert {t.device.type for a in ("one", "two") for t in whole_tensors(tuned, a).values()} == {"meta"}


def test_a_resume_file_without_the_head_is_refused(tmp_path):
    tuned = train(inlay.tune(classifier(), inlay.S2FT(ratio=0.2)))
    tuned.save_pretrained(tmp_path)
    resume = load_file(tmp_path / "model.safetensors")
    assert "score.weight" in resume
    again = inlay.tune(with_new_head(classifier()), inlay.S2FT(ratio=0.2))
    again.load_state_dict(resume, strict=False)
    assert_equal(logits(again), logits(tuned), "resumed")
    del resume["score.weight"]
    with pytest.raises(RuntimeError, match="lacks trained tensors.*score.weight"):
        again.load_state_dict(resume, strict=False)


def test_loading_onto_another_head(tmp_path):
    tuned = train(inlay.tune(classifier(), inlay.S2FT(ratio=0.2, modules_to_save=[])))
    assert not tuned.score.weight.requires_grad
    tuned.save_pretrained(tmp_path / "frozen")
    assert_equal(logits(inlay.load(classifier(), tmp_path / "frozen")), logits(tuned), "its own head")
    with pytest.raises(ValueError, match=r"score.weight differs by .* from that in training.*check_base=False"):
        inlay.load(with_new_head(classifier()), tmp_path / "frozen")
    inlay.load(with_new_head(classifier()), tmp_path / "frozen", check_base=False)

    inlay.tune(llama(), inlay.S2FT(ratio=0.2))
    language = train(inlay.tune(llama(), inlay.S2FT(ratio=0.2)), text_batch(0))
    language.save_pretrained(tmp_path / "language")
    with pytest.raises(ValueError, match="holds no score, the head of this LlamaForSequenceClassification"):
        inlay.load(classifier(), tmp_path / "language")

    tuned = train(inlay.tune(classifier(), inlay.S2FT(ratio=0.2)))
    tuned.save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match=r"score.weight: wanted shape \(2, 32\), got \(3, 32\).*num_labels"):
        inlay.load(classifier(labels=2), tmp_path / "three")
    file = tmp_path / "three" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "score" not in k}, file)
    with pytest.raises(ValueError, match=r"wanted base_model.model.score.weight, .*incomplete"):
        inlay.load(classifier(), tmp_path / "three")


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"modules_to_save: 'scor' names nothing.*did you mean 'score'"):
        inlay.tune(classifier(), inlay.S2FT(modules_to_save=["scor"]))
    with pytest.raises(ValueError, match="is in target_modules and in modules_to_save"):
        inlay.tune(llama(), inlay.LoRA(target_modules=["q_proj"], modules_to_save=["layers.0.self_attn.q_proj"]))
    packed = inlay.tune(llama(), inlay.LoRA(target_modules=["q_proj"]), base="nf4")
    with pytest.raises(ValueError, match=r"up_proj is to be trained whole .* stored quantized"):
        inlay.tune(packed, inlay.LoRA(target_modules=["q_proj"], modules_to_save=["up_proj"]), adapter_name="b")
    with pytest.raises(ValueError, match=r"q_proj\S* is to be trained whole .* an adapter has a piece on"):
        inlay.tune(packed, inlay.LoRA(target_modules=["k_proj"], modules_to_save=["q_proj"]), adapter_name="b")
    # a target by name keeps the head from training whole
    tuned = inlay.tune(classifier(), inlay.LoRA(target_modules=["q_proj", "score"]))
    assert not tuned.score.weight.requires_grad and tuned.score.deltas


def test_buffers_of_a_head_come_back(tmp_path):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(32), nn.Linear(32, 3)

        def forward(self, x):
            return self.out(self.norm(x.transpose(1, 2)).transpose(1, 2))

    def build():
        torch.manual_seed(3)
        model = classifier()
        model.score = Head()
        return model

    tuned = train(inlay.tune(build(), inlay.S2FT(ratio=0.2)))
    assert bool(tuned.score.norm.running_mean.any())
    tuned.save_pretrained(tmp_path)
    assert_equal(logits(inlay.load(build(), tmp_path)), logits(tuned), "logits")
    with inlay.disabled(tuned):
        assert not bool(tuned.score.norm.running_mean.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_with_a_head_goes_to_peft_and_back(dtype, tmp_path):
    tuned = train(inlay.tune(classifier(dtype=dtype), inlay.LoRA(r=4)))
    tuned.save_pretrained(tmp_path / "ours")
    inlay.export(tuned, tmp_path / "export")
    bound = 2e-5 if dtype is torch.float32 else 0.1
    for folder in ("ours", "export"):
        theirs = peft.PeftModel.from_pretrained(with_new_head(classifier(dtype=dtype)), tmp_path / folder)
        assert_close(logits(theirs), logits(tuned), atol=bound, what=folder)


@pytest.mark.parametrize("method", ["s2ft", "lora"])
def test_adapters_of_peft_with_a_head_load(method, tmp_path):
    from inlay.integrations.peft import S2FTConfig

    config = (
        S2FTConfig(ratio=0.2, task_type="SEQ_CLS")
        if method == "s2ft"
        else peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS")
    )
    theirs = train(peft.get_peft_model(classifier(), config))
    theirs.save_pretrained(tmp_path)
    loaded = inlay.load(with_new_head(classifier()), tmp_path)
    assert_close(logits(loaded), logits(theirs), atol=2e-5, what="logits")
    assert loaded.score.weight.requires_grad
    loaded.save_pretrained(tmp_path / "again")
    assert_equal(logits(inlay.load(with_new_head(classifier()), tmp_path / "again")), logits(loaded), "logits")


def test_peft_unties_what_it_trains(tmp_path):
    build = lambda: BY_NAME["gemma"].build()  # noqa: E731
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    train(peft.get_peft_model(build(), config), text_batch(0)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embed_tokens.weight alone.*tie_word_embeddings=False"):
        inlay.load(build(), tmp_path)


def test_options_of_peft_that_we_have_not(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    train(peft.get_peft_model(llama(), config), text_batch(0)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="uses use_dora=True"):
        inlay.load(llama(), tmp_path)


def test_estimate_counts_a_head():
    batch = {k: v for k, v in class_batch(0).items()}
    with_head = inlay.estimate(classifier(), inlay.S2FT(ratio=0.2), batch=batch)
    without = inlay.estimate(classifier(), inlay.S2FT(ratio=0.2, modules_to_save=[]), batch=batch)
    assert with_head.trainable - without.trainable == 3 * 32 * 4
    assert with_head.adapter > without.adapter + 3 * 32 * 4
    tuned = inlay.tune(classifier(), inlay.S2FT(ratio=0.2))
    assert inlay.estimate(tuned, batch=batch).trainable == with_head.trainable


def test_verify_compares_classifiers_and_question_answerers():
    tuned = train(inlay.tune(classifier(), inlay.S2FT(ratio=0.2)))
    merged = inlay.merge(tuned)
    found = inlay.verify(tuned, merged, [torch.arange(3, 9)])
    assert found.max_logit_diff < 1e-4 and found.tokens_equal
    merged.score.weight.data.neg_()
    assert inlay.verify(tuned, merged, [torch.arange(3, 9)]).max_logit_diff > 1e-2
    config = transformers.LlamaConfig(**_LLAMA)
    answerer = perturb(transformers.LlamaForQuestionAnswering(config))
    assert inlay.verify(answerer, copy.deepcopy(answerer), [torch.arange(3, 9)]).max_logit_diff == 0


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing(reentrant):
    tuned = inlay.tune(classifier(), inlay.S2FT(ratio=0.2))
    tuned(**class_batch(0)).loss.backward()
    wanted = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.requires_grad}
    tuned.zero_grad()
    if reentrant is not None:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    tuned(**class_batch(0)).loss.backward()
    for name, gradient in wanted.items():
        assert_close(tuned.get_parameter(name).grad, gradient, atol=1e-6, what=name)


def test_merging_on_disk(tmp_path):
    build = classifier
    build().save_pretrained(tmp_path / "base")
    tuned = train(inlay.tune(build(), inlay.S2FT(ratio=0.2)))
    tuned.save_pretrained(tmp_path / "adapter")
    inlay.adapters.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_state_equal(merged.state_dict(), inlay.merge(tuned).state_dict())
    llama().save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="trained score.weight whole"):
        inlay.adapters.merge_files(tmp_path / "headless", tmp_path / "adapter", tmp_path / "no")


def test_coverage_counts_what_trains_whole():
    tuned = inlay.tune(classifier(), inlay.S2FT(ratio=0.2))
    rows = {row.name: row for row in inlay.coverage.coverage(tuned)}
    assert rows["score"].tuned == 1 and rows["q_proj"].tuned == 0
