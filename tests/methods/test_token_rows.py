"""Rows of tokens: of tied heads and untied ones, of vocabularies that grew, in PEFT's files, merged on disk."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from comparing import assert_close, assert_equal
from families import VOCABULARY, eval_logits, llama, text_batch
from methods import shake, trainables
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import inlay
from inlay.adapters.merge_files import merge_files

TOKENS = [41, 3, 9, 20]
NEW = 5
both = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def batch(vocabulary: int = VOCABULARY, seed: int = 0) -> dict[str, torch.Tensor]:
    made = text_batch(seed)
    made["input_ids"][:, 3:6] = torch.arange(vocabulary - 3, vocabulary)
    made["labels"][:, 4:7] = torch.arange(vocabulary - 3, vocabulary)
    return made


def close(ours: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """Equal but for the roundings of fp32."""
    assert_close(ours, wanted, atol=1e-5 * float(wanted.abs().max()), what=what)


def on_disk(path, tied: bool):
    """A checkpoint of a Llama, which knows how many tokens it came with."""
    llama(tie_word_embeddings=tied).save_pretrained(path)
    return lambda: AutoModelForCausalLM.from_pretrained(path)


def grown(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model.resize_token_embeddings(VOCABULARY + NEW, mean_resizing=False)
    return model


def steps(model: nn.Module, count: int = 3) -> nn.Module:
    optimizer = torch.optim.AdamW(trainables(model.train()).values(), lr=1e-2)
    for step in range(count):
        optimizer.zero_grad()
        model(**batch(VOCABULARY + NEW, step)).loss.backward()
        optimizer.step()
    return model


# --- tied weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        inlay.TokenRows(tokens=TOKENS),
        inlay.ToolkenGPT(tokens=TOKENS),
        inlay.LoRA(r=4, target_modules=["embed_tokens"]),
        inlay.S2FT(target_modules=["embed_tokens"], ratio=0.1),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_tied_head_takes_part(method, tmp_path):
    """One Parameter, saved once, merged once, and the merged model is tied again."""
    tuned = inlay.tune(llama(tie_word_embeddings=True), method)
    names = [name for name in trainables(tuned)]
    assert names and all(name.startswith("model.embed_tokens.deltas.default.") for name in names)
    assert not [key for key in tuned.state_dict() if key.startswith("lm_head.deltas")]
    base = eval_logits(tuned, batch())
    shake(tuned)
    ours = eval_logits(tuned, batch())
    tuned.save_pretrained(tmp_path)
    assert {key.split(".")[3] for key in load_file(tmp_path / "adapter_model.safetensors")} == {"embed_tokens"}
    copied = copy.deepcopy(tuned)
    shake(copied, seed=1)  # its head hears of its own embeddings
    assert not torch.equal(eval_logits(copied, batch()), ours)
    assert_equal(eval_logits(tuned, batch()), ours, "the original")
    with inlay.disabled(tuned):
        assert_equal(eval_logits(tuned, batch()), base, "disabled")
    merged = inlay.merge(tuned)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert type(merged.lm_head) is nn.Linear and type(merged.model.embed_tokens) is nn.Embedding
    close(eval_logits(merged, batch()), ours, "merged")
    with pytest.raises(ValueError, match=r"shared its weight with \['lm_head'\].*tie_word_embeddings=True"):
        inlay.load(llama(), tmp_path)


def test_a_tied_rows_logit_moves_and_no_other():
    tuned = inlay.tune(llama(tie_word_embeddings=True), inlay.TokenRows(tokens=[50]))
    ids = torch.tensor([[4, 5, 6]])  # none of them the token
    before = eval_logits(tuned, {"input_ids": ids})
    with torch.no_grad():
        tuned.model.embed_tokens.deltas["default"].trainable_tokens_delta.add_(1.0)
    moved = (eval_logits(tuned, {"input_ids": ids}) != before).any(0).any(0)
    assert moved.nonzero().flatten().tolist() == [50]


def test_every_table_that_is_shared_takes_part():
    """T5 holds its table four times: as it is, in the encoder, in the decoder and in the head."""
    tuned = shake(inlay.tune(families.BY_NAME["t5"].build(), inlay.TokenRows(tokens=TOKENS)))
    assert list(trainables(tuned)) == ["shared.deltas.default.trainable_tokens_delta"]
    merged = inlay.merge(tuned)
    weights = {id(m.weight) for m in (merged.shared, merged.encoder.embed_tokens, merged.decoder.embed_tokens)}
    assert weights == {id(merged.lm_head.weight)}


def test_the_loss_with_a_tuned_head_is_the_eager_one():
    tuned = inlay.tune(llama(tie_word_embeddings=True), inlay.TokenRows(tokens=TOKENS)).train()
    assert torch.is_tensor(tuned(**batch()).logits)
    tuned = inlay.tune(llama(), inlay.TokenRows(tokens=TOKENS, head=False)).train()
    tuned(**batch())
    assert tuned.loss_function.last == "fused"
    # a head that became fused by another adapter before it was tuned
    tuned = inlay.tune(llama(tie_word_embeddings=True), inlay.LoRA(r=2))
    inlay.tune(tuned, inlay.TokenRows(tokens=TOKENS), adapter_name="tokens")
    shake(tuned).train()
    loss = tuned(**batch()).loss
    assert tuned.loss_function.last == "eager"
    close(loss.detach(), inlay.merge(tuned)(**batch()).loss.detach(), "loss")


def test_two_adapters_on_tied_rows_add_up():
    tuned = shake(inlay.tune(llama(tie_word_embeddings=True), inlay.TokenRows(tokens=TOKENS)))
    inlay.tune(tuned, inlay.LoRA(r=2, embeddings=True), adapter_name="lora")
    shake(tuned, seed=1)
    tuned.set_adapter(["default", "lora"])
    ours = eval_logits(tuned, batch())
    merged = inlay.merge(tuned)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    close(eval_logits(merged, batch()), ours, "merged")


def test_a_weighted_sum_of_adapters():
    tuned = shake(inlay.tune(llama(tie_word_embeddings=True), inlay.TokenRows(tokens=TOKENS)))
    inlay.tune(tuned, inlay.TokenRows(tokens=[9, 60]), adapter_name="other")
    shake(tuned, seed=1)
    tuned.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    tuned.set_adapter(["default", "other"])
    wanted = eval_logits(tuned, batch())
    tuned.set_adapter("sum")
    close(eval_logits(tuned, batch()), wanted, "sum")


# --- a vocabulary that grew --------------------------------------------------------------------------------

GROWN = {
    "token-rows": lambda tied: inlay.TokenRows(),
    "full": lambda tied: inlay.Full(rounding="fp32"),
    "modules-to-save": lambda tied: inlay.LoRA(r=2, modules_to_save=["embed_tokens", "lm_head"]),
    "token-rows-and-old": lambda tied: inlay.TokenRows(tokens=[5, *range(VOCABULARY, VOCABULARY + NEW)]),
}


@both
@pytest.mark.parametrize("make", GROWN.values(), ids=GROWN)
def test_new_tokens_train_and_come_back_on_a_fresh_base(make, tied, tmp_path):
    """The base that loads the adapter has never been resized: the file does that, and brings the rows."""
    build = on_disk(tmp_path / "base", tied)
    tuned = steps(inlay.tune(grown(build()), make(tied)))
    wanted = eval_logits(tuned, batch(VOCABULARY + NEW))
    tuned.save_pretrained(tmp_path / "adapter")
    fresh = build()
    torch.manual_seed(77)
    loaded = inlay.load(fresh, tmp_path / "adapter")
    assert loaded.get_input_embeddings().weight.shape[0] == VOCABULARY + NEW
    close(eval_logits(loaded, batch(VOCABULARY + NEW)), wanted, "loaded")
    merged = inlay.merge(loaded)
    close(eval_logits(merged, batch(VOCABULARY + NEW)), wanted, "merged")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    close(eval_logits(again, batch(VOCABULARY + NEW)), wanted, "saved merged")


@both
def test_rows_mean_the_same_on_a_base_that_was_resized_otherwise(tied, tmp_path):
    build = on_disk(tmp_path / "base", tied)
    tuned = steps(inlay.tune(grown(build()), inlay.TokenRows()))
    tuned.save_pretrained(tmp_path / "adapter")
    other = grown(build(), seed=5)
    loaded = inlay.load(other, tmp_path / "adapter")
    ids = batch(VOCABULARY + NEW)
    close(eval_logits(loaded, ids), eval_logits(tuned, ids), "loaded")


def test_what_lacks_the_new_rows_says_so(tmp_path):
    """Embeddings without a head, tools without embeddings, changes of rows: the base has to have the new tokens."""
    build = on_disk(tmp_path / "base", tied=False)
    for method in (
        inlay.TokenRows(head=False),
        inlay.ToolkenGPT(),
        inlay.LoRA(r=2, embeddings=True),
        inlay.S2FT(target_modules=["embed_tokens"], ratio=1.0),
    ):
        model = grown(build())
        shake(inlay.tune(model, method)).save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="resize_token_embeddings"):
            inlay.load(build(), tmp_path / "adapter")
        loaded = inlay.load(grown(build()), tmp_path / "adapter")
        ids = batch(VOCABULARY + NEW)
        assert_equal(eval_logits(loaded, ids), eval_logits(model, ids), type(method).__name__)


def test_tools_of_an_untied_head_train_its_rows_alone(tmp_path):
    tuned = inlay.tune(grown(on_disk(tmp_path, tied=False)()), inlay.ToolkenGPT())
    (name, rows), *others = trainables(tuned).items()
    assert name == "lm_head.deltas.default.trainable_tokens_delta" and rows.shape[0] == NEW and not others
    tuned.train()(**batch(VOCABULARY + NEW)).loss.backward()
    assert bool(rows.grad.any(1).all())


# --- PEFT --------------------------------------------------------------------------------------------------


def trained_by_peft(model: nn.Module, config, where) -> torch.Tensor:
    """Logits of an adapter of PEFT's with random values, saved to ``where``."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(model, config)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    theirs.save_pretrained(where)
    return eval_logits(theirs, batch())


@both
@pytest.mark.filterwarnings("ignore")
def test_tokens_from_peft(tied, tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=targets)
    wanted = trained_by_peft(llama(tie_word_embeddings=tied), config, tmp_path)
    loaded = inlay.load(llama(tie_word_embeddings=tied), tmp_path)
    close(eval_logits(loaded, batch()), wanted, "logits")


@both
@pytest.mark.filterwarnings("ignore")
def test_tokens_to_peft(tied, tmp_path):
    peft = pytest.importorskip("peft")
    tuned = shake(inlay.tune(llama(tie_word_embeddings=tied), inlay.TokenRows(tokens=TOKENS)))
    tuned.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path)
    wanted = eval_logits(tuned, batch())
    close(eval_logits(theirs, batch()), wanted, "logits")
    close(eval_logits(theirs.merge_and_unload(), batch()), wanted, "merged by PEFT")


@both
@pytest.mark.filterwarnings("ignore")
def test_lora_on_embeddings_from_peft(tied, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=tied)
    wanted = trained_by_peft(llama(tie_word_embeddings=tied), config, tmp_path)
    assert any(key.endswith(".base_layer.weight") for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = inlay.load(llama(tie_word_embeddings=tied), tmp_path)
    close(eval_logits(loaded, batch()), wanted, "logits")


@both
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", ["save", "export"])
def test_lora_on_embeddings_to_peft(tied, write, tmp_path):
    peft = pytest.importorskip("peft")
    method = inlay.LoRA(r=4, target_modules=["embed_tokens", "q_proj"])
    tuned = shake(inlay.tune(llama(tie_word_embeddings=tied), method))
    tuned.save_pretrained(tmp_path) if write == "save" else inlay.export(tuned, tmp_path, format="peft-lora")
    theirs = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path)
    close(eval_logits(theirs, batch()), eval_logits(tuned, batch()), "logits")


@pytest.mark.filterwarnings("ignore")
def test_pefts_table_of_a_vocabulary_that_grew_is_taken(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])
    trained = grown(llama())
    wanted = trained_by_peft(trained, config, tmp_path)
    loaded = inlay.load(llama(), tmp_path)
    assert loaded.get_input_embeddings().weight.shape[0] == VOCABULARY + NEW
    close(eval_logits(loaded, batch()), wanted, "logits")


@pytest.mark.filterwarnings("ignore")
def test_pefts_lora_on_one_side_of_a_tie_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"])
    trained_by_peft(llama(tie_word_embeddings=True), config, tmp_path)
    with pytest.raises(ValueError, match="left lm_head.*tie_word_embeddings=False"):
        inlay.load(llama(tie_word_embeddings=True), tmp_path)


# --- merging on disk ---------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "method", [inlay.TokenRows(tokens=TOKENS), inlay.LoRA(r=2, embeddings=True)], ids=["rows", "lora"]
)
def test_merged_on_disk_it_is_the_same(method, tied, tmp_path):
    build = on_disk(tmp_path / "base", tied)
    tuned = shake(inlay.tune(build(), method))
    tuned.save_pretrained(tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    close(eval_logits(merged, batch()), eval_logits(tuned, batch()), "logits")


# --- what cannot be ----------------------------------------------------------------------------------------


def refused(match: str, method, model: nn.Module | None = None, **options) -> None:
    model = llama(tie_word_embeddings=True) if model is None else model
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        inlay.tune(model, method, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_weight_is_chosen_once():
    rows = {"tokens": TOKENS}
    refused("modules_to_save", inlay.TokenRows(**rows, modules_to_save=["lm_head"]))
    refused("part of what trains whole", inlay.TokenRows(**rows, modules_to_save=["embed_tokens"]))
    refused("modules_to_save", inlay.TokenRows(**rows, modules_to_save=["lm_head"]), base="nf4")
    refused("shared with model.embed_tokens", inlay.LoRA(target_modules=["embed_tokens", "lm_head"]))
    refused("shared with model.embed_tokens", inlay.LoRA(target_modules=["lm_head"]))
    tuned = inlay.tune(llama(tie_word_embeddings=True), inlay.TokenRows(**rows))
    for method in (inlay.LoRA(target_modules=["lm_head"]), inlay.Full(target_modules=["lm_head"])):
        with pytest.raises(ValueError, match="lm_head"):
            inlay.tune(tuned, method, adapter_name="second")
    whole = inlay.tune(llama(tie_word_embeddings=True), inlay.Full(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="trains whole in another adapter"):
        inlay.tune(whole, inlay.TokenRows(**rows), adapter_name="second")


def test_tokens_that_cannot_be_meant():
    refused("0 to 96.*got 97.*resize_token_embeddings", inlay.TokenRows(tokens=[VOCABULARY]))
    refused("is not at hand", inlay.TokenRows())
    for tokens, match in (([], "at least one"), ([3, 3], "distinct"), ("newest", "list of token ids")):
        with pytest.raises(ValueError, match=match):
            inlay.TokenRows(tokens=tokens)
    refused("outside the layers", inlay.TokenRows(tokens=TOKENS, layers_to_transform=[0]))
    refused("no table of tokens", inlay.TokenRows(tokens=TOKENS, target_modules=["q_proj"]))
    refused("no embedding of tokens", inlay.TokenRows(tokens=TOKENS), families.BY_NAME["vit"].build())
    refused("has none", inlay.ToolkenGPT(tokens=TOKENS), families.BY_NAME["bert"].build())
    refused("other arguments", inlay.LoRA(target_modules=["embed_positions"]), families.BY_NAME["opt"].build())


def test_no_new_token_says_so(tmp_path):
    refused("no new one", inlay.TokenRows(), on_disk(tmp_path, tied=True)())


def test_a_packed_head_is_refused():
    base = inlay.BaseConfig("nf4", skip_modules=[])
    refused("quantized.*skip_modules", inlay.TokenRows(tokens=TOKENS), llama(), base=base)


def test_s2ft_says_what_rows_cannot_do():
    for options in ({"side": "in"}, {"update": "in_place"}, {"strategy": "activation"}):
        refused("rows of an embedding", inlay.S2FT(target_modules=["embed_tokens"], **options))
