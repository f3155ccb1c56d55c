"""save_pretrained(delta=True): the rows that training changed, and the same bits back on the same base alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from comparing import assert_equal, assert_state_equal
from families import BY_NAME, eval_logits, llama, text_batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inlay
from inlay.adapters import merge_files
from inlay.adapters.changed_rows import changed_rows
from inlay.adapters.files import CONFIG_NAME, RESUME_NAME, WEIGHTS_NAME
from inlay.nn.whole import whole_tensors

EMBEDDING = "model.embed_tokens.weight"
METHODS = {
    "full": lambda: inlay.Full(),
    "full fp32": lambda: inlay.Full(rounding="fp32"),
    "lisa": lambda: inlay.LISA(layers=1, every=3),
    "hft": lambda: inlay.HFT(redraw_every=2, outside=True),
    "head beside": lambda: inlay.FreezeLayers(layers=1, modules_to_save=["model.embed_tokens"]),
}


def base(dtype=torch.float32, name="llama") -> nn.Module:
    return BY_NAME[name].build().to(dtype)


def trained(model: nn.Module, method, steps: int = 3) -> nn.Module:
    """Of 97 tokens the batch has less than half."""
    tuned = inlay.tune(model, method).train()
    optimizer = inlay.optim.AdamW(tuned.parameters(), lr=1e-2, weight_decay=0.0, rounding="residual")
    for _ in range(steps):
        optimizer.zero_grad()
        tuned(**text_batch(0)).loss.backward()
        optimizer.step()
    return tuned


def size(directory) -> int:
    return (directory / WEIGHTS_NAME).stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_bits_come_back(name, method, dtype, tmp_path):
    if name == "gpt2" and method == "head beside":
        pytest.skip("names llama's embedding")
    tuned = trained(base(dtype, name), METHODS[method]())
    tuned.save_pretrained(tmp_path / "whole")
    tuned.save_pretrained(tmp_path / "delta", delta=True)
    assert not (tmp_path / "delta" / RESUME_NAME).exists()
    loaded = inlay.load(base(dtype, name), tmp_path / "delta")
    as_ever = whole_tensors(inlay.load(base(dtype, name), tmp_path / "whole"), "default")
    for key, tensor in whole_tensors(tuned, "default").items():
        found = whole_tensors(loaded, "default")[key]
        assert found.dtype == tensor.dtype and found.requires_grad == as_ever[key].requires_grad
        assert_equal(found.detach(), tensor.detach(), key)
    assert_equal(eval_logits(loaded, text_batch(1)), eval_logits(tuned, text_batch(1)), "logits")
    assert_state_equal(inlay.merge(loaded).state_dict(), inlay.merge(tuned).state_dict())
    loaded.disable_adapters()
    for key, tensor in base(dtype, name).named_parameters():
        assert_equal(loaded.get_parameter(key).detach(), tensor.detach(), key)


def test_rows_that_never_changed_are_not_stored(tmp_path):
    tuned = trained(base(torch.bfloat16), inlay.Full())
    tuned.save_pretrained(tmp_path / "whole")
    tuned.save_pretrained(tmp_path / "delta", delta=True)
    ids = text_batch(0)["input_ids"].unique()
    tensors = load_file(tmp_path / "delta" / WEIGHTS_NAME)
    rows = tensors[f"base_model.model.{EMBEDDING}.changed_rows"]
    assert set(rows.tolist()) <= set(ids.tolist()) and 0 < rows.numel() < 50
    assert f"base_model.model.{EMBEDDING}" not in tensors
    assert "base_model.model.lm_head.weight" in tensors  # every row of a head that is not tied has a gradient
    assert size(tmp_path / "delta") < size(tmp_path / "whole")


def test_a_later_save_leaves_no_older_values_to_resume_from(tmp_path):
    tuned = trained(base(), inlay.Full())
    tuned.save_pretrained(tmp_path)
    assert (tmp_path / RESUME_NAME).exists()
    tuned.save_pretrained(tmp_path, delta=True)
    assert not (tmp_path / RESUME_NAME).exists()


def off_by_a_bit(model: nn.Module, row: int) -> nn.Module:
    with torch.no_grad():
        table = model.get_parameter(EMBEDDING)
        table[row, 3] = torch.nextafter(table[row, 3], torch.tensor(9.0)) if table.dtype == torch.float32 else 0.5
    return model


def test_another_base_is_refused(tmp_path):
    """By one bit of one row that is not stored; what is stored may differ, as it is replaced."""
    tuned = trained(base(), inlay.Full())
    tuned.save_pretrained(tmp_path, delta=True)
    stored = load_file(tmp_path / WEIGHTS_NAME)[f"base_model.model.{EMBEDDING}.changed_rows"].tolist()
    absent = next(row for row in range(97) if row not in stored)
    with pytest.raises(ValueError, match=r"embed_tokens.weight: .*delta=True.* not those of the base"):
        inlay.load(off_by_a_bit(base(), absent), tmp_path)
    with pytest.raises(ValueError, match="not those of the base"):  # what check_base skips is another question
        inlay.load(off_by_a_bit(base(), absent), tmp_path, check_base=False)
    loaded = inlay.load(off_by_a_bit(base(), stored[0]), tmp_path)
    assert_equal(loaded.get_parameter(EMBEDDING).detach(), tuned.get_parameter(EMBEDDING).detach(), "embedding")
    base().save_pretrained(tmp_path / "right")
    off_by_a_bit(base(), absent).save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match="not those of the base"):
        merge_files(tmp_path / "wrong", tmp_path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_in_another_width_gives_the_same_bits_or_is_refused(tmp_path):
    tuned = trained(base(torch.bfloat16), inlay.Full())
    tuned.save_pretrained(tmp_path / "bf16", delta=True)
    loaded = inlay.load(base(torch.bfloat16).float(), tmp_path / "bf16")
    wanted = tuned.get_parameter(EMBEDDING).detach().float()
    assert_equal(loaded.get_parameter(EMBEDDING).detach().float(), wanted, "embedding")
    tuned = trained(base(), inlay.Full())
    tuned.save_pretrained(tmp_path / "fp32", delta=True)
    with pytest.raises(ValueError, match="in torch.float32: load that very checkpoint"):
        inlay.load(base(torch.bfloat16), tmp_path / "fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merged_on_disk(dtype, tmp_path):
    base(dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tuned = trained(base(dtype), inlay.Full())
    for delta in (False, True):
        tuned.save_pretrained(tmp_path / f"adapter{delta}", delta=delta)
        merge_files(tmp_path / "base", tmp_path / f"adapter{delta}", tmp_path / f"merged{delta}")
    for file in (tmp_path / "mergedFalse").glob("*.safetensors"):
        assert_state_equal(load_file(tmp_path / "mergedTrue" / file.name), load_file(file))


def test_sums_and_swaps(tmp_path):
    tuned = trained(base(), inlay.Full())
    tuned.save_pretrained(tmp_path / "whole")
    tuned.save_pretrained(tmp_path / "delta", delta=True)
    sums = []
    for kind in ("whole", "delta"):
        model = inlay.load(base(), tmp_path / kind, name="one")
        model.load_adapter(str(tmp_path / kind), "other")
        model.add_weighted_adapter(["one", "other"], [0.25, 0.5], "sum")
        model.set_adapter("sum")
        sums.append(copy.deepcopy(whole_tensors(model, "sum")))
    assert_state_equal(sums[1], sums[0])
    other = trained(base(), inlay.Full(), steps=1)
    other.hotswap_adapter(str(tmp_path / "delta"))
    assert_state_equal(whole_tensors(other, "default"), whole_tensors(tuned, "default"))


def test_a_loaded_adapter_trains_on_and_is_saved_again(tmp_path):
    tuned = trained(base(torch.bfloat16), inlay.Full())
    tuned.save_pretrained(tmp_path / "one", delta=True)
    loaded = inlay.load(base(torch.bfloat16), tmp_path / "one").train()
    optimizer = inlay.optim.AdamW(loaded.parameters(), lr=1e-2, weight_decay=0.0, rounding="residual")
    loaded(**text_batch(7)).loss.backward()
    optimizer.step()
    loaded.save_pretrained(tmp_path / "two", delta=True)
    again = inlay.load(base(torch.bfloat16), tmp_path / "two")
    assert_state_equal(whole_tensors(again, "default"), whole_tensors(loaded, "default"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 3), (7, 2, 5), (50,), (1, 4)])
def test_any_tensor_by_its_bits(shape, dtype):
    """Also of zeros of another sign; and nothing where rows would take more than the tensor."""
    random = torch.Generator().manual_seed(len(shape))
    original = torch.randn(shape, generator=random).to(dtype)
    original.view(-1)[0] = 0.0
    value = original.clone()
    value.view(-1)[0] = -0.0
    found = changed_rows("w", value, original)
    row = 8 + value[:1].nbytes
    if row >= value.nbytes:
        assert found is None
        return
    assert found.rows.tolist() == [0]
    back = found.onto(original.clone())
    assert torch.equal(back.view(torch.uint8), value.view(torch.uint8))
    unchanged = changed_rows("w", original.clone(), original)
    assert unchanged.rows.numel() == 0 and torch.equal(unchanged.onto(original), original)
    assert changed_rows("w", original + 1, original) is None


REFUSED = {
    "no tensor whole": (lambda: inlay.S2FT(ratio=0.3), "wanted a method that trains the model's own tensors whole"),
    "no original": (lambda: inlay.Full(keep_original=False), r"is gone \(keep_original=False\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_saved_so_is_refused(kind, tmp_path):
    make, message = REFUSED[kind]
    tuned = trained(base(), make())
    with pytest.raises(ValueError, match=message):
        tuned.save_pretrained(tmp_path / "no", delta=True)
    assert not (tmp_path / "no").exists()


def test_a_base_whose_own_values_are_gone_cannot_swap_rows_in(tmp_path):
    trained(base(), inlay.Full()).save_pretrained(tmp_path, delta=True)
    other = trained(base(), inlay.Full(keep_original=False))
    with pytest.raises(ValueError, match="own values are gone"):
        other.hotswap_adapter(str(tmp_path))


BREAKS = {
    "lost rows": lambda t, key: t.pop(f"{key}.changed_rows"),
    "lost values": lambda t, key: t.pop(f"{key}.changed_values"),
    "a row too far": lambda t, key: t[f"{key}.changed_rows"][-1:].add_(1000),
    "a row twice": lambda t, key: t[f"{key}.changed_rows"][1:2].copy_(t[f"{key}.changed_rows"][:1]),
    "too few values": lambda t, key: t.update({f"{key}.changed_values": t[f"{key}.changed_values"][1:].clone()}),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_files_are_refused(kind, tmp_path):
    trained(base(), inlay.Full()).save_pretrained(tmp_path, delta=True)
    tensors: dict[str, Tensor] = load_file(tmp_path / WEIGHTS_NAME)
    BREAKS[kind](tensors, f"base_model.model.{EMBEDDING}")
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"file is (incomplete|corrupt)"):
        inlay.load(base(), tmp_path)


def test_formats(tmp_path):
    """Files with rows say so by their format, which an older inlay refuses; others are as they were."""
    tuned = trained(base(), inlay.Full())
    for delta, wanted in ((False, 2), (True, 3)):
        tuned.save_pretrained(tmp_path, delta=delta)
        assert json.loads((tmp_path / CONFIG_NAME).read_text())["inlay"]["format"] == wanted
    tied = trained(llama(tie_word_embeddings=True), inlay.Full())  # a tied head changes every row
    tied.save_pretrained(tmp_path, delta=True)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["inlay"]["format"] == 2
    with safe_open(tmp_path / WEIGHTS_NAME, framework="pt") as file:
        assert not any("changed" in key for key in file.keys())  # noqa: SIM118
