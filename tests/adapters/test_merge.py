"""Merging: plain modules, their own dtype and channel order, the same answers; the tuned model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import assert_close, assert_equal, assert_state_equal, max_diff
from families import BY_NAME, CAUSAL, FAMILIES, eval_logits, llama, prompt, text_batch
from oracle import deltas_of, randomize, trained_mask

import inlay
from inlay.nn.mixed import Mixed
from inlay.nn.tuned_linear import TunedLinear
from inlay.pieces.linear import Delta

UPDATES = ["additive", "in_place"]


def trained(family, update="additive", dtype=torch.float32, **options):
    options = {"ratio": 0.2, "update": update} | options
    tuned = inlay.tune(family.build().to(dtype), inlay.S2FT(**options))
    randomize(tuned, 0.1)
    return tuned


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_same_answers_from_plain_modules(family, update):
    base, tuned = family.build(), trained(family, update)
    wanted = eval_logits(tuned, family.batch(0))
    state = {key: tensor.clone() for key, tensor in tuned.state_dict().items()}
    merged = inlay.merge(tuned)
    assert_close(eval_logits(merged, family.batch(0)), wanted, atol=1e-5 * family.slack, what="logits")
    assert not torch.equal(wanted, eval_logits(base, family.batch(0)))

    assert {name: type(module) for name, module in merged.named_modules()} == {
        name: type(module) for name, module in base.named_modules()
    }
    assert type(merged) is type(base)
    assert not any(isinstance(module, Mixed | TunedLinear | Delta) for module in merged.modules())
    assert list(merged.state_dict()) == list(base.state_dict())
    for key, tensor in merged.state_dict().items():
        before = base.state_dict()[key]
        path = key.rpartition(".")[0]
        if path in deltas_of(tuned) and key.endswith(".weight"):
            mask = trained_mask(tuned, path)
            assert_equal(tensor[~mask], before[~mask], f"untrained channels of {key}")
            assert bool((tensor[mask] != before[mask]).all()), f"trained channels of {key}"
        else:
            assert_equal(tensor, before, key)

    assert_state_equal(tuned.state_dict(), state)
    assert_equal(eval_logits(tuned, family.batch(0)), wanted, "logits of the tuned model after the merge")


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("family", CAUSAL, ids=str)
def test_verify_finds_merged_and_tuned_equal(family, update):
    tuned = trained(family, update)
    result = inlay.verify(tuned, inlay.merge(tuned), [prompt(i)[0] for i in range(3)], max_new_tokens=6)
    assert result.tokens_equal and result.tokens_agreeing == 1.0 and result.prompts == 3
    assert 0 <= result.max_logit_diff <= 1e-4


@pytest.mark.parametrize("update", UPDATES)
def test_verify_notices_a_difference(update):
    tuned = trained(BY_NAME["llama"], update)
    ids = [prompt(i)[0] for i in range(3)]
    result = inlay.verify(tuned, llama(), ids, max_new_tokens=6)
    pairs = [[eval_logits(model, {"input_ids": i[None]}) for model in (tuned, llama())] for i in ids]
    wanted = max(max_diff(*pair) for pair in pairs)
    assert abs(result.max_logit_diff - wanted) <= 1e-6 and not result.tokens_equal and result.tokens_agreeing < 1
    broken = inlay.merge(tuned)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    assert not inlay.verify(tuned, broken, ids).max_logit_diff <= 1e9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_rounds_once_into_the_weights_own_dtype(name, update, dtype):
    base, tuned = BY_NAME[name].build().to(dtype), trained(BY_NAME[name], update, dtype)
    merged = inlay.merge(tuned)
    for path, delta in deltas_of(tuned).items():
        before, after = base.get_submodule(path).weight, merged.get_submodule(path).weight
        change = delta.weight_delta().t() if name == "gpt2" else delta.weight_delta()
        assert after.dtype is dtype and after.is_contiguous() and after.stride() == before.stride()
        if update == "additive":
            assert_equal(after, (before.to(change.dtype) + change).to(dtype), path)
        else:
            values = torch.zeros_like(delta.weight_delta())
            values.index_copy_(delta.dim, delta.s2ft_indices, delta.s2ft_values.detach())
            values = values.t() if name == "gpt2" else values
            mask = trained_mask(tuned, path)
            assert_equal(after[mask], values[mask].to(dtype), path)


@pytest.mark.parametrize("update", UPDATES)
def test_in_place_merge_turns_the_model_itself_plain(update):
    tuned = trained(BY_NAME["llama"], update)
    copied = inlay.merge(tuned)
    merged = inlay.merge(tuned, in_place=True)
    assert merged is tuned and type(merged) is type(llama())
    assert_state_equal(merged.state_dict(), copied.state_dict())
    assert not [name for name in vars(merged) if name.startswith(("inlay", "_inlay"))]
    with pytest.raises(TypeError, match="wanted a model from inlay"):
        inlay.merge(merged)


@pytest.mark.parametrize("update", UPDATES)
def test_a_merged_model_can_be_saved_loaded_and_tuned_again(update, tmp_path):
    tuned = trained(BY_NAME["llama"], update)
    merged = inlay.merge(tuned)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    assert_state_equal(loaded.state_dict(), merged.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        merged.load_state_dict({})  # the tuned model's leniency is gone
    again = inlay.tune(merged, inlay.S2FT(ratio=0.3, update=update, seed=1))
    assert_close(eval_logits(again, text_batch(0)), eval_logits(tuned, text_batch(0)), atol=1e-5, what="logits")


def test_merging_while_disabled_gives_the_base():
    tuned = trained(BY_NAME["llama"])
    with inlay.disabled(tuned):
        assert_state_equal(inlay.merge(tuned).state_dict(), llama().state_dict())


@pytest.mark.parametrize("update", UPDATES)
def test_merging_before_training_gives_the_base(update):
    for dtype in (torch.float32, torch.bfloat16):
        tuned = inlay.tune(llama().to(dtype), inlay.S2FT(ratio=0.4, update=update))
        assert_state_equal(inlay.merge(tuned).state_dict(), llama().to(dtype).state_dict())


def test_merging_a_model_that_trained_keeps_its_mode():
    tuned = trained(BY_NAME["llama"])
    assert all(module.training for module in inlay.merge(tuned).modules())
    assert not any(module.training for module in inlay.merge(tuned.eval()).modules())


def test_merge_of_a_copy_shares_nothing_with_the_tuned_model():
    tuned = trained(BY_NAME["llama"])
    ours = {p.data_ptr() for p in tuned.parameters()}
    assert not ours & {p.data_ptr() for p in inlay.merge(tuned).parameters()}
    copied = copy.deepcopy(tuned)
    assert not ours & {p.data_ptr() for p in copied.parameters()}
