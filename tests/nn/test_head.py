"""The fused loss equals the model's own, in value and gradient, wherever it engages; elsewhere the own one runs."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import assert_close, assert_equal
from families import BY_NAME, CAUSAL, FAMILIES, TOKENS, VOCABULARY, llama, text_batch
from oracle import randomize
from transformers.modeling_outputs import CausalLMOutputWithPast

import inlay
from inlay.nn.head import DeferredLogits, FusedCausalLoss, LogitsNotKeptError


def pair(family, **options):
    """The same trained model with its own loss and with the fused one."""
    eager = inlay.tune(family.build(), inlay.S2FT(ratio=0.2, **options), fused_blocks=False, fused_loss=False)
    fused = inlay.tune(family.build(), inlay.S2FT(ratio=0.2, **options), fused_blocks=False, fused_loss=True)
    for model in (eager, fused):
        randomize(model, 0.1)
    return eager, fused


def assert_same_loss(eager, fused, batch, scale: float = 1.0, **kwargs):
    results = []
    for model in (eager, fused):
        model.zero_grad()
        loss = model(**batch, **kwargs).loss
        (scale * loss).backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (wanted, wanted_gradients), (loss, gradients) = results
    assert loss.dtype == wanted.dtype
    assert_close(loss, wanted, atol=1e-6 * float(wanted.abs()), what="loss")
    for name, gradient in wanted_gradients.items():
        assert bool(gradient.any())
        assert_close(gradients[name], gradient, atol=1e-5 * float(gradient.abs().max()), what=name)


@pytest.mark.parametrize("family", CAUSAL, ids=str)
def test_equals_the_models_own_loss(family):
    eager, fused = pair(family)
    assert_same_loss(eager, fused, family.batch(0))
    assert fused._loss_function.last == ("fused" if family.fused_loss else "eager")


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.causal], ids=str)
def test_is_not_installed_on_other_models(family):
    tuned = inlay.tune(family.build(), inlay.S2FT(ratio=0.2))
    assert not isinstance(getattr(tuned, "_loss_function", None), FusedCausalLoss)
    assert isinstance(tuned(**family.batch(0)).logits, torch.Tensor)


@pytest.mark.parametrize("family", [f for f in CAUSAL if f.fused_loss], ids=str)
def test_options_of_the_loss(family):
    eager, fused = pair(family)
    batch = family.batch(0)
    for items in (7, torch.tensor(13)):
        assert_same_loss(eager, fused, batch, num_items_in_batch=items)
    assert_same_loss(eager, fused, batch, scale=0.25)  # what Trainer's accumulation and a GradScaler do
    shifted = torch.roll(batch["labels"], -1, dims=1)
    shifted[:, -1] = 5  # unlike the shift it does itself
    assert_same_loss(eager, fused, batch, shift_labels=shifted)
    assert_same_loss(eager, fused, batch, shift_labels=shifted, num_items_in_batch=11)
    assert_same_loss(eager, fused, {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == -100, 4)})
    own = batch["labels"].masked_fill(batch["labels"] == -100, 9)
    assert_same_loss(eager, fused, {**batch, "labels": own}, ignore_index=9)
    assert fused._loss_function.last == "fused"


def test_tuples_and_no_grad():
    eager, fused = pair(BY_NAME["llama"])
    batch = text_batch(0)
    assert_close(fused(**batch, return_dict=False)[0], eager(**batch, return_dict=False)[0], atol=1e-6, what="tuple")
    with torch.no_grad():
        outputs = fused(**batch)
        assert_close(outputs.loss, eager(**batch).loss, atol=1e-6, what="no_grad")
        assert outputs.logits.shape == (3, TOKENS, VOCABULARY)
    assert fused._loss_function.last == "eager"


def test_mixtral_keeps_its_router_loss():
    eager, fused = pair(BY_NAME["mixtral"])
    plain = fused(**text_batch(0)).loss.item()
    for model in (eager, fused):
        model.router_aux_loss_coef = 0.7
    options = {"output_router_logits": True}
    assert_same_loss(eager, fused, text_batch(0), **options)
    assert fused._loss_function.last == "fused"
    assert fused(**text_batch(0), **options).loss.item() > plain + 0.5


def test_nothing_supervised_is_as_torch_has_it():
    eager, fused = pair(BY_NAME["llama"])
    batch = text_batch(0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert bool(fused(**batch).loss.isnan()) and bool(eager(**batch).loss.isnan())
    loss = fused(**batch, num_items_in_batch=5).loss
    loss.backward()
    assert loss.item() == 0 == eager(**batch, num_items_in_batch=5).loss.item()
    assert not any(bool(p.grad.any()) for p in fused.parameters() if p.requires_grad)


def test_labels_out_of_range_are_refused():
    _, fused = pair(BY_NAME["llama"])
    batch = text_batch(0)
    batch["labels"][1, 4] = VOCABULARY
    with pytest.raises(IndexError, match=r"labels.*97"):
        fused(**batch)


# --- logits after the fused loss, and without one -----------------------------------------------------------


def test_reading_consumed_logits_names_the_switch():
    _, fused = pair(BY_NAME["llama"])
    outputs = fused(**text_batch(0))
    assert isinstance(outputs, CausalLMOutputWithPast)
    for use in (
        lambda x: x.shape,
        lambda x: x + 1,
        lambda x: x[0],
        lambda x: x.argmax(-1),
        lambda x: torch.softmax(x, -1),
        lambda x: torch.nn.functional.cross_entropy(x, x),
    ):
        with pytest.raises(LogitsNotKeptError, match="fused_loss=False"):
            use(outputs.logits)
    assert "consumed" in repr(outputs.logits)
    assert not hasattr(outputs.logits, "shape")


def test_eval_gives_logits():
    eager, fused = pair(BY_NAME["llama"])
    outputs = fused.eval()(**text_batch(0))
    assert type(outputs.logits) is torch.Tensor
    assert_equal(outputs.logits, eager.eval()(**text_batch(0)).logits, "logits")


def test_a_loss_of_the_users_own_works_on_deferred_logits():
    """Without labels nothing is fused: what is done to the logits is done to real ones, with gradients."""
    eager, fused = pair(BY_NAME["llama"])
    batch = text_batch(0)
    labels = batch.pop("labels")
    losses = {}
    for key, model in {"eager": eager, "fused": fused}.items():
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1) / 2.0, labels[:, 1:].flatten())
        loss.backward()
        losses[key] = loss
    assert_equal(losses["fused"], losses["eager"], "loss")
    for (name, p), q in zip(eager.named_parameters(), fused.parameters()):
        if p.requires_grad:
            assert_equal(q.grad, p.grad, name)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1.5,
        lambda x: 1.5 - x,
        lambda x: -x,
        lambda x: x * x,
        lambda x: x / 3,
        lambda x: x**2,
        lambda x: x[0, 1:],
        lambda x: x.float().sum(-1),
        lambda x: torch.tanh(x),
        lambda x: torch.stack([x, x]),
        lambda x: x == x.max(),
        lambda x: abs(x),
        lambda x: x > 0.5,
        lambda x: torch.tensor(len(x)),
        lambda x: torch.tensor([row.sum().item() for row in x]),
        lambda x: torch.tensor(x.size()),
        lambda x: x.contiguous().reshape(-1),
        lambda x: x - x[0],
        lambda x: torch.einsum("abc,abc->ab", x, x),
    ],
)
def test_deferred_logits_behave_as_logits(use):
    head = torch.nn.Linear(8, 5)
    hidden = torch.randn(2, 3, 8)
    assert_equal(use(DeferredLogits(hidden, head)), use(head(hidden)))


def test_deferred_logits_are_computed_once_and_dropped_by_the_loss():
    logits = DeferredLogits(torch.randn(2, 3, 8), torch.nn.Linear(8, 5))
    assert logits.materialize() is logits.materialize()
    FusedCausalLoss(None)(logits, torch.ones(2, 3, dtype=torch.int64))
    assert logits.computed is None
    with pytest.raises(LogitsNotKeptError):
        logits.materialize()


def test_a_trained_output_head_keeps_the_models_own_loss():
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2, target_modules=["lm_head"]))
    outputs = tuned(**text_batch(0))
    assert type(outputs.logits) is torch.Tensor
    outputs.loss.backward()
    assert bool(tuned.lm_head.deltas["default"].s2ft_values.grad.any())


def test_a_second_adapter_on_the_head_turns_the_fused_loss_off():
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.2))
    inlay.tune(tuned, inlay.S2FT(ratio=0.2, target_modules=["lm_head"]), adapter_name="head")
    randomize(tuned, 0.3, name="head")
    merged = inlay.merge(tuned)
    assert_close(tuned(**text_batch(0)).loss, merged(**text_batch(0)).loss, atol=1e-5, what="loss")


@pytest.mark.parametrize("change", ["scale", "cap"])
def test_a_model_that_changes_its_logits_is_left_to_its_own_loss(change):
    """No list of families: whatever happens between head and loss is seen, also in a model nobody knows."""
    from transformers import LlamaForCausalLM

    class Changed(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            logits = self.lm_head(hidden)
            logits = logits * 0.3 if change == "scale" else torch.tanh(logits)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            return CausalLMOutputWithPast(loss=loss, logits=logits)

    base = llama()
    eager = Changed(base.config).train()
    eager.load_state_dict(base.state_dict())
    tuned = inlay.tune(copy.deepcopy(eager), inlay.S2FT())
    wanted = eager(**text_batch(0)).loss
    assert_close(tuned(**text_batch(0)).loss, wanted, atol=2e-6, what="loss")
    assert abs(float(wanted) - float(base(**text_batch(0)).loss)) > 0.1
    assert tuned._loss_function.last == "eager"


def test_autocast_and_bfloat16_losses_are_fp32_and_close():
    for how in ("weights", "autocast"):
        family = BY_NAME["llama"]
        exact = inlay.tune(family.build(), inlay.S2FT(ratio=0.2))(**text_batch(0)).loss
        model = family.build().to(torch.bfloat16) if how == "weights" else family.build()
        tuned = inlay.tune(model, inlay.S2FT(ratio=0.2))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            loss = tuned(**text_batch(0)).loss
        assert loss.dtype is torch.float32 and tuned._loss_function.last == "fused"
        assert_close(loss, exact, atol=0.02, what=how)
        assert not torch.equal(loss, exact)
