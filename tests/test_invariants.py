"""What must hold of every method, on every row of tests/methods.py: a new method gets all of this by its row."""

from __future__ import annotations

import copy
import json

import families
import pytest
import torch
from comparing import assert_close, assert_equal
from families import eval_logits, llama, text_batch
from methods import ROWS, Row, data_for, pairs, shake, trainables
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay.nn.tuned_linear import TunedLinear
from inlay.state import tuned_linears

BATCHES = [text_batch(seed) for seed in range(4)]
LLAMA = families.BY_NAME["llama"]
every_row = pytest.mark.parametrize("row", ROWS, ids=str)
on_every_family = pytest.mark.parametrize("row, family", pairs(ROWS))


def tuned_by(row: Row, model: nn.Module | None = None, family=LLAMA, **options) -> nn.Module:
    """A model tuned by a row; of options that name a module it lacks (lm_head) it is not asked."""
    model = llama(**row.model) if model is None else model
    if row.make(**options).modules_to_save and not hasattr(model, "lm_head"):
        pytest.skip("this family has no lm_head of its own")
    return inlay.tune(model, row.make(**options), base=row.base, calibration=data_for(row, family.batch))


def loss_of(model: nn.Module, batch=None) -> torch.Tensor:
    torch.manual_seed(7)  # the same dropout
    return model(**(BATCHES[0] if batch is None else batch)).loss


def gradients(model: nn.Module, batch=None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: parameter.grad.clone() for name, parameter in trainables(model).items()}


def steps(model: nn.Module, optimizer, batches) -> list[float]:
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def adamw(model: nn.Module):
    return inlay.optim.AdamW(trainables(model).values(), lr=1e-2, rounding="residual")


def close(ours: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert_close(ours, wanted, atol=2e-4 * max(float(wanted.abs().max()), 1e-3), what=what)


# --- tuning ------------------------------------------------------------------------------------------------


@on_every_family
def test_tuning_alone_changes_nothing(row, family):
    """Nor does a disabled adapter that has been trained; and everything that trains is fp32 and gets a gradient."""
    model = family.build()
    before = eval_logits(model, family.batch(0))
    tuned = tuned_by(row, model, family)
    held = trainables(tuned)
    assert held and all(parameter.dtype == torch.float32 for parameter in held.values())
    fresh = eval_logits(tuned, family.batch(0))
    with inlay.disabled(tuned):
        base = eval_logits(tuned, family.batch(0))
    if row.base is None:
        close(base, before, "the base")
    if row.keeps_base:
        close(fresh, base, "logits after tune")
    shake(tuned.train())
    with inlay.disabled(tuned):
        assert_equal(eval_logits(tuned, family.batch(0)), base, "disabled")
    assert float((eval_logits(tuned, family.batch(0)) - base).abs().max()) > 1e-4
    for name, grad in gradients(tuned.train(), family.batch(0)).items():
        assert bool(torch.isfinite(grad).all()) and bool(grad.any()), name


@every_row
def test_micro_batches_add_up(row):
    """Gradients of a sum of losses are the sum of their gradients: nothing overwrites."""
    tuned = shake(tuned_by(row).train())
    apart = [gradients(tuned, batch) for batch in BATCHES[:2]]
    tuned.zero_grad()
    for batch in BATCHES[:2]:
        loss_of(tuned, batch).backward()
    for name, parameter in trainables(tuned).items():
        close(parameter.grad, apart[0][name] + apart[1][name], name)


@every_row
def test_fused_blocks_and_loss_change_no_gradient(row):
    method = row.make()
    unfused = {"fused_blocks": False, "fused_loss": False, "calibration": data_for(row)}
    plain = shake(inlay.tune(llama(**row.model), method, base=row.base, **unfused).train())
    fused = shake(tuned_by(row).train())
    if "drop" in row.name:
        fused.set_padding_free(False)  # dropout draws a number for each token that runs
    wanted = gradients(plain)
    for name, grad in gradients(fused).items():
        close(grad, wanted[name], name)


# --- files -------------------------------------------------------------------------------------------------


@on_every_family
def test_saved_and_loaded_it_is_the_same(row, family, tmp_path):
    tuned = shake(tuned_by(row, family.build(), family))
    tuned.save_pretrained(tmp_path)
    loaded = inlay.load(family.build(), tmp_path, base=row.base)
    assert_equal(eval_logits(loaded, family.batch(0)), eval_logits(tuned, family.batch(0)), "logits")
    again, held = trainables(loaded), trainables(tuned)
    assert list(again) == list(held)
    for name, parameter in held.items():
        assert_equal(again[name], parameter, name)


@on_every_family
def test_merged_it_is_a_plain_model(row, family):
    tuned = shake(tuned_by(row, family.build(), family))
    wanted = eval_logits(tuned, family.batch(0))
    merged = inlay.merge(tuned)
    assert not any(isinstance(module, TunedLinear) for module in merged.modules())
    assert {type(m).__name__ for m in merged.modules()} == {type(m).__name__ for m in family.build().modules()}
    assert list(merged.state_dict()) == list(family.build().state_dict())
    # A quantized base is merged into its dequantized weights: other products, other roundings.
    close(eval_logits(merged, family.batch(0)), wanted, "logits")


@every_row
def test_training_resumes_bit_for_bit(row, tmp_path):
    straight = tuned_by(row).train()
    optimizer = adamw(straight)
    losses = steps(straight, optimizer, BATCHES)

    first = tuned_by(row).train()
    halfway = adamw(first)
    begun = steps(first, halfway, BATCHES[:2])
    first.save_pretrained(tmp_path)
    torch.save(halfway.state_dict(), tmp_path / "optimizer.pt")

    second = inlay.load(llama(**row.model), tmp_path, base=row.base).train()
    resumed = adamw(second)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert begun + steps(second, resumed, BATCHES[2:]) == losses
    assert list(trainables(second)) == list(trainables(straight))
    for name, parameter in straight.named_parameters():
        assert_equal(dict(second.named_parameters())[name], parameter, name)


@every_row
def test_broken_files_are_refused(row, tmp_path):
    shake(tuned_by(row)).save_pretrained(tmp_path / "good")
    path = tmp_path / "good" / "adapter_model.safetensors"
    good, config = load_file(path), json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    first = next(key for key, tensor in good.items() if tensor.is_floating_point())

    def without(key):
        return {other: tensor for other, tensor in good.items() if other != key}

    broken = {
        "missing": without(first),
        "unknown": {**good, "base_model.model.nowhere.weight": torch.ones(2)},
        "not finite": {**good, first: torch.full_like(good[first], float("nan"))},
        "other shape": {**good, first: torch.cat([good[first], good[first]])},
    }
    for what, tensors in broken.items():
        save_file(tensors, path)
        with pytest.raises((ValueError, RuntimeError), match=".{20}"):
            inlay.load(llama(**row.model), path.parent, base=row.base)
            raise AssertionError(what)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError):
        inlay.load(llama(**row.model), path.parent, base=row.base)
    save_file(good, path)
    config["inlay"]["options"]["no_such_option"] = 1
    (path.parent / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, TypeError), match="no_such_option"):
        inlay.load(llama(**row.model), path.parent, base=row.base)


@every_row
def test_exported_it_is_the_same_in_peft(row, tmp_path):
    peft = pytest.importorskip("peft")
    if not row.exports:
        pytest.skip("changes what the base holds: no LoRA says the same")
    tuned = shake(tuned_by(row))
    inlay.export(tuned, tmp_path, format="peft-lora")
    wanted = eval_logits(tuned, BATCHES[0])
    plain = llama(**row.model)
    if row.base is not None:  # the quantized base as a plain model: what bitsandbytes would hold
        with inlay.disabled(tuned):
            base = {name: module.dense_base(torch.float32) for name, module in tuned_linears(tuned).items()}
        for name, weight in base.items():
            plain.get_submodule(name).weight.data.copy_(weight)
        untuned = [n for n, m in tuned.named_modules() if hasattr(m, "storage") and n not in base]
        for name in untuned:
            plain.get_submodule(name).weight.data.copy_(tuned.get_submodule(name).dense_base(torch.float32))
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
    close(eval_logits(theirs, BATCHES[0]), wanted, "logits")


# --- several adapters --------------------------------------------------------------------------------------


@every_row
def test_a_second_adapter(row, tmp_path):
    """Switching, adding up and deleting; or a refusal where the first owns the base."""
    tuned = shake(tuned_by(row))
    first = eval_logits(tuned, BATCHES[0])
    method = row.make(seed=5)
    if not row.shares:
        with pytest.raises(ValueError, match="wanted one adapter on a base"):
            inlay.tune(tuned, method, adapter_name="second", calibration=data_for(row))
        return
    if not row.keeps_base:  # loftq starts from a dense base
        method = inlay.LoRA(r=4)
    inlay.tune(tuned, method, adapter_name="second", calibration=data_for(row))
    shake(tuned, seed=1)
    second = eval_logits(tuned, BATCHES[0])
    assert not torch.equal(first, second)
    for name, wanted in (("default", first), ("second", second)):
        tuned.set_adapter(name)
        assert_equal(eval_logits(tuned, BATCHES[0]), wanted, name)
        others = {n for n in trainables(tuned) if (".second" in n) != (name == "second")}
        assert not {n for n in others if ".deltas." in n}
    with pytest.raises(ValueError, match="is active"):
        tuned.delete_adapter("second")
    tuned.set_adapter("default")
    tuned.delete_adapter("second")
    assert_equal(eval_logits(tuned, BATCHES[0]), first, "after deleting the other")
    with pytest.raises(ValueError, match="no adapter 'second'"):
        tuned.set_adapter("second")


@every_row
def test_hotswap_takes_another_files_values(row, tmp_path):
    wanted = {}
    for seed in (1, 2):
        model = shake(tuned_by(row), seed=seed)
        wanted[seed] = eval_logits(model, BATCHES[0])
        model.save_pretrained(tmp_path / str(seed))
    model = inlay.load(llama(**row.model), tmp_path / "1", base=row.base)
    for seed in (2, 1):
        model.hotswap_adapter(tmp_path / str(seed))
        assert_equal(eval_logits(model, BATCHES[0]), wanted[seed], f"seed {seed}")


# --- the backward ------------------------------------------------------------------------------------------


@every_row
def test_nothing_is_kept_below_what_trains(row):
    if row.below:
        pytest.skip("trains below the blocks")
    tuned = shake(tuned_by(row, llama(num_hidden_layers=3, **row.model), layers_to_transform=[2]).train())
    known = {t.untyped_storage().data_ptr() for t in (*tuned.parameters(), *tuned.buffers())}
    where, kept = [None], {0: 0, 1: 0, 2: 0}
    for index, layer in enumerate(tuned.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: where.__setitem__(0, index))
        layer.register_forward_hook(lambda *_: where.__setitem__(0, None))

    def pack(tensor):
        if where[0] is not None and tensor.untyped_storage().data_ptr() not in known:
            kept[where[0]] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(tuned)
    loss.backward()
    assert kept[0] == kept[1] == 0 < kept[2]


@every_row
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(row, reentrant):
    tuned = shake(tuned_by(row).train())
    wanted = gradients(tuned)
    tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got = gradients(tuned)
    if row.dropout:  # dropout of the loss's own randomness is drawn at other places
        assert got.keys() == wanted.keys()
        return
    for name, grad in got.items():
        close(grad, wanted[name], name)


# --- dtypes, estimates, refusals ---------------------------------------------------------------------------


@every_row
def test_a_bf16_model_trains_exactly(row):
    tuned = tuned_by(row, llama(**row.model).to(torch.bfloat16)).train()
    held = torch.bfloat16 if row.whole else torch.float32
    assert {parameter.dtype for parameter in trainables(tuned).values()} == {held}
    losses = steps(tuned, adamw(tuned), BATCHES * 3)
    assert all(loss == loss for loss in losses) and losses[-4:] < losses[:4]
    moved = tuned_by(row).train().to(torch.bfloat16)
    wide = (
        {torch.float32, torch.bfloat16} if row.whole else {torch.float32}
    )  # what no schedule has chosen yet moves along
    assert {parameter.dtype for parameter in trainables(moved).values()} <= wide
    assert torch.isfinite(loss_of(moved))


@every_row
def test_the_estimate_counts_what_trains(row):
    tuned = tuned_by(row).train()
    ids = families.prompt(tokens=24, rows=3)
    found = inlay.estimate(copy.deepcopy(tuned), batch=3, seq=24)
    tuned(input_ids=ids, labels=ids)  # a schedule chooses at the first forward
    assert found.trainable == sum(p.numel() * p.element_size() for p in trainables(tuned).values())
    known = {t.untyped_storage().data_ptr() for t in (*tuned.parameters(), *tuned.buffers())}
    known.add(ids.untyped_storage().data_ptr())  # inputs are nobody's to free
    held, seen = [], {}

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known and pointer not in seen:
            seen[pointer] = tensor.untyped_storage().nbytes()
            held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = tuned(input_ids=ids, labels=ids).loss
    assert found.kept_bytes == sum(seen.values()), (found.kept_bytes, sum(seen.values()))
    del loss


@every_row
def test_what_cannot_be_meant_is_refused(row):
    for options, error in (
        ({"target_modules": ["no_such_linear"]}, ValueError),
        ({"layers_to_transform": [99]}, ValueError),
        ({"exclude_modules": ["no_such_linear"]}, ValueError),
        ({"modules_to_save": ["no_such_module"]}, ValueError),
        ({"no_such_option": 1}, TypeError),
    ):
        model = llama(**row.model)
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(error, match="no_such|99"):
            inlay.tune(model, row.make(**options), base=row.base, calibration=data_for(row))
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert all(parameter.requires_grad for parameter in model.parameters())
    tuned = tuned_by(row)
    with pytest.raises(ValueError, match="tuned already"):
        inlay.tune(tuned, row.make())
    assert type(row.make()).from_dict(row.make().to_dict()) == row.make()


@every_row
def test_compiled_it_computes_the_same(row):
    tuned = shake(tuned_by(row).train())
    if row.dropout:
        tuned.eval()
    wanted = gradients(tuned) if not row.dropout else None
    plain = eval_logits(tuned, BATCHES[0])
    compiled = torch.compile(tuned, backend="aot_eager")
    close(eval_logits(compiled, BATCHES[0]), plain, "logits")
    if wanted is not None:
        tuned.train()
        for name, grad in gradients(compiled).items():
            close(grad, wanted[name.removeprefix("_orig_mod.")], name)
