"""A padded batch that runs as one row of its tokens: the same loss and gradients, and where it has to stay as it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as hf
from comparing import assert_close, assert_equal
from families import _LLAMA, BY_NAME, TOKENS, VOCABULARY, llama, perturb

import inlay
from inlay import _native
from inlay.data.packing import logits_of_neighbours
from inlay.integrations.padding_free import row_of, row_width
from inlay.nn import attention as fused
from inlay.nn.rows import RowMask
from inlay.nn.spans import spans_of

native = pytest.mark.skipif(not _native.available(), reason="the native module is not built")


def gemma3():
    options = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "num_hidden_layers": 3}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return perturb(hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**(_LLAMA | options | {"layer_types": layers}))))


BUILD = {name: BY_NAME[name].build for name in BY_NAME} | {"gemma3": gemma3}
BY_LENGTHS = ["llama", "qwen2", "qwen3", "gemma", "gemma3", "mistral", "mixtral", "granite"]
BY_POSITIONS = ["gpt2", "gemma2"]


def batch(side="right", rows=5, tokens=TOKENS, seed=0, lengths=None):
    """Rows of unequal length, prompts without labels."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, tokens - 1, (rows,), generator=random) if lengths is None else torch.tensor(lengths)
    lengths[1] = tokens
    at = torch.arange(tokens)
    real = at < lengths[:, None] if side == "right" else at >= tokens - lengths[:, None]
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=random).masked_fill(~real, 0)
    begin = torch.zeros(rows, 1) if side == "right" else (tokens - lengths)[:, None]
    labels = ids.masked_fill(~real | (at <= begin), -100)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": labels}


def step(model, given, mode, **extra):
    """Loss, gradients and the positions computed."""
    model.set_padding_free(mode)
    model.zero_grad()
    loss = model(**given, **extra).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, model.inlay_state.padding_free.computed


def tuned(name, method=None, **options):
    model = inlay.tune(BUILD[name](), method or inlay.LoRA(r=2), **options).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def assert_same_step(model, given, mode, **extra):
    loss, grads, computed = step(model, given, mode, **extra)
    wanted_loss, wanted, padded = step(model, given, False, **extra)
    assert padded is None and computed == row_width(int(given["attention_mask"].sum())) < given["input_ids"].numel()
    assert_close(loss, wanted_loss, atol=1e-5, what="loss")
    assert grads.keys() == wanted.keys() and grads
    for name, gradient in wanted.items():
        assert_close(grads[name], gradient, atol=2e-5, what=name)


@native
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", BY_LENGTHS)
def test_loss_and_gradients_are_those_of_the_padded_batch(name, side):
    model = tuned(name)
    assert model.inlay_state.padding_free.why_not(model, TOKENS) is None
    with model.inlay_state.padding_free.only_the_loss():
        for seed in range(2):
            given = batch(side, seed=seed)
            assert_same_step(model, given, "auto")
            assert_same_step(model, given, "auto", num_items_in_batch=torch.tensor(37))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", BY_POSITIONS)
def test_what_runs_by_masks_only_does_so_when_it_is_asked_to(name, side):
    model = tuned(name)
    given = batch(side)
    assert step(model, given, "auto")[2] is None
    assert_same_step(model, given, True)


@pytest.mark.parametrize("name", ["opt", "t5", "bert"])
def test_what_cannot_keeps_its_padding_and_says_why(name):
    family = BY_NAME[name]
    model = inlay.tune(family.build(), inlay.LoRA(r=2)).train()
    given = batch() if family.causal else family.batch(0)
    loss, _, computed = step(model, given, "auto")
    assert computed is None
    assert_equal(loss, step(model, given, False)[0], "loss")
    model.set_padding_free("auto")
    assert model.inlay_state.padding_free.why_not(model, TOKENS)
    model.set_padding_free(True)
    with pytest.raises(ValueError, match=r"padding_free=True: wanted a model whose samples stay apart in one row"):
        model.inlay_state.padding_free.why_not(model, TOKENS)


@native
@pytest.mark.parametrize(
    "method, base",
    [
        (inlay.S2FT(ratio=0.2), None),
        (inlay.S2FT(ratio=0.2), "nf4"),
        (inlay.S2FT(ratio=0.2, update="in_place"), None),
        (inlay.FreezeLayers(layers=1), None),
        (inlay.LISA(layers=1), None),
        (inlay.BitFit(), None),
        (inlay.SSF(), None),
        (inlay.LoRA(r=2), "int8"),
    ],
)
def test_methods(method, base):
    model = inlay.tune(llama(attention_bias=True), method, base=base).train()
    assert_same_step(model, batch(), "auto")


@native
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(reentrant, monkeypatch):
    model = tuned("mistral")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.inlay_state.padding_free.why_not(model, 16)
    written = count_written(monkeypatch)
    assert_same_step(model, batch(), "auto")
    assert not written


def count_written(monkeypatch):
    """Masks of N x N that somebody makes of a row's."""
    made, own = [], RowMask.mask

    def counted(self, window=None):
        made.append(self)
        return own(self, window)

    monkeypatch.setattr(RowMask, "mask", counted)
    return made


@native
def test_frozen_blocks_and_evaluation_run_by_lengths_too(monkeypatch):
    """Nothing below the first trained block asks for a gradient, and torch would form every score of the row."""
    from inlay.nn.head import losses_only

    model = inlay.tune(llama(num_hidden_layers=3), inlay.FreezeLayers(layers=1)).train()
    model.inlay_state.padding_free.why_not(model, 16)
    calls, own = [], fused.attention
    monkeypatch.setattr(fused, "attention", lambda *args: (calls.append(args[4]), own(*args))[1])
    written = count_written(monkeypatch)
    given = batch()
    step(model, given, "auto")
    assert len(calls) == 3 and all(spans is not None for spans in calls)
    model.eval()
    with torch.no_grad(), losses_only(model):
        loss = model(**given).loss
        assert model.inlay_state.padding_free.computed and len(calls) == 6 and not written
        model.set_padding_free(False)
        assert_close(loss, model(**given).loss, atol=1e-5, what="loss")
    model.set_padding_free("auto")
    with torch.no_grad():
        assert model(**given).logits.shape[:2] == given["input_ids"].shape


def test_logits_that_are_kept_stand_where_their_tokens_stood():
    """Granite scales its logits, so that they are not deferred; left alone, unless it is said that nobody minds."""
    model, given = tuned("granite"), batch("left")
    assert step(model, given, "auto")[2] is None and model._loss_function.last == "eager"
    unfused = inlay.tune(llama(), inlay.S2FT(ratio=0.2), fused_loss=False).train()
    assert step(unfused, given, "auto")[2] is None
    model.set_padding_free(True)
    logits = model(**given).logits
    assert model.inlay_state.padding_free.computed
    model.set_padding_free(False)
    real = given["attention_mask"].bool()
    assert_close(logits[real], model(**given).logits[real], atol=1e-5, what="logits")
    assert not logits[~real].any()


def test_what_a_row_would_change_stays_padded():
    given = batch()
    names = ("input_ids", "labels", "attention_mask")
    ids, labels, mask = (given[name] for name in names)
    assert row_of(ids, labels, mask) is not None
    gap = mask.clone()
    gap[1, 4] = 0
    assert row_of(ids, labels.masked_fill(gap == 0, -100), gap) is None
    on_padding = labels.clone()
    on_padding[mask == 0] = 5
    assert row_of(ids, on_padding, mask) is None
    left = batch("left")
    assert row_of(*(left[name] for name in names)) is not None
    first = left["input_ids"].masked_fill(left["attention_mask"] == 0, -100)  # the first token is predicted by padding
    assert row_of(left["input_ids"], first, left["attention_mask"]) is None
    assert row_of(ids, labels, torch.ones_like(mask)) is None
    assert row_of(ids, labels, torch.zeros_like(mask)) is None


def test_a_row_is_hardly_wider_than_its_tokens_and_shapes_recur():
    widths = [row_width(tokens) for tokens in range(1, 5000)]
    assert all(n <= width < n + max(8, n / 64 + 1) for n, width in enumerate(widths, 1))
    assert len(set(widths)) < 350


@native
def test_who_sees_hidden_states_keeps_the_padding():
    model, given = tuned("llama"), batch()
    assert step(model, given, "auto")[2]
    seen = []
    handle = model.model.layers[0].register_forward_hook(lambda m, a, y: seen.append(y.shape))
    assert step(model, given, "auto")[2] is None and seen[0][:2] == given["input_ids"].shape
    handle.remove()
    assert step(model, given, "auto", output_hidden_states=True)[2] is None
    assert step(model, given, "auto", token_type_ids=torch.zeros_like(given["input_ids"]))[2] is None
    model.config.output_hidden_states = True
    assert step(model, given, "auto")[2] is None
    model.config.output_hidden_states = False
    assert step(model, given, "auto")[2]


@native
def test_copies_decide_for_themselves():
    model = tuned("llama")
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    other.set_padding_free(False)
    assert step(model, batch(), "auto")[2]
    assert other.inlay_state.padding_free.computed is None and other.inlay_state.padding_free.mode is False
    assert step(other, batch(), "auto")[2]
    plain = inlay.merge(model)
    assert not plain._forward_pre_hooks


def test_a_setting_nobody_knows_is_refused():
    with pytest.raises(ValueError, match=r'padding_free: wanted "auto", True or False, got \'yes\''):
        tuned("llama").set_padding_free("yes")


@native
def test_a_mask_of_its_own_is_not_proven(monkeypatch):
    """A block whose mask is more than samples, later tokens and the window it names."""
    model = inlay.tune(gemma3(), inlay.LoRA(r=2))
    assert model.inlay_state.padding_free.why_not(model, 3) is None
    for module in model.modules():
        if isinstance(module, fused.FusedAttention):
            module.inlay_attention_kwargs = {**module.inlay_attention_kwargs, "sliding_window": 5}
    assert "masks something else" in model.inlay_state.padding_free.why_not(model, 12)


def test_a_row_mask_is_the_mask_it_stands_for():
    starts = torch.tensor([0, 0, 0, 3, 3, 5, 5, 5, 5])
    mask = RowMask(starts)
    at = torch.arange(9)
    wanted = ((at <= at[:, None]) & (starts == starts[:, None]))[None, None]
    assert mask.shape == (1, 1, 9, 9) and mask.dtype == torch.bool and mask.dim() == 4 and not mask.written
    assert torch.equal(~mask, ~wanted) and mask.written == 1
    assert torch.equal(mask[..., :4], wanted[..., :4]) and torch.equal(torch.where(mask, 1, 0), wanted.long())
    assert torch.equal(mask.spans(2), spans_of(wanted & (at > at[:, None] - 2)))
    assert mask.detach() is mask


@native
def test_neighbours_are_seen_where_a_mask_lets_them():
    model = llama().eval()
    leak, shift = logits_of_neighbours(model, mask=lambda starts: RowMask(torch.zeros_like(starts)))
    assert leak > 0.01 and shift > 0.01
    leak, shift = logits_of_neighbours(model, mask=RowMask)
    assert leak < 1e-6 and shift < 1e-5


@native
def test_padding_stays_where_a_piece_draws_for_whole_samples():
    """A row is one sample to it: all would be left out, or none."""
    model = tuned("llama", inlay.RAdapter(r=2, drop_path=0.5))
    assert step(model, batch(), "auto")[2] is None
    with pytest.raises(ValueError, match="draws random numbers for whole samples"):
        step(model, batch(), True)
    assert step(tuned("llama", inlay.RAdapter(r=2, drop_path=0.0)), batch(), "auto")[2] is not None
