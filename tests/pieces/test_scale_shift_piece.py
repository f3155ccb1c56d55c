"""Scale and shift of outputs: the function against float64, what it keeps, which norms it merges into, and SSF."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close, assert_equal
from families import BY_NAME, eval_logits, llama, text_batch
from methods import shake
from torch import nn

import inlay
from inlay.pieces.scale_shift import Scale, ScaleShift, norm_offset, scale_shift
from inlay.state import pieces_of


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("channels", [None, [1, 4, 5]])
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 7), (0, 7)])
@pytest.mark.parametrize("which", ["both", "scale", "shift"])
def test_gradients_are_those_of_finite_differences(which, shape, channels):
    width = 7 if channels is None else len(channels)
    x = random(*shape, dtype=torch.float64).requires_grad_()
    scale = random(width, seed=1, dtype=torch.float64).requires_grad_() if which != "shift" else None
    shift = random(width, seed=2, dtype=torch.float64).requires_grad_() if which != "scale" else None
    index = None if channels is None else torch.tensor(channels)
    inputs = [tensor for tensor in (x, scale, shift) if tensor is not None]
    assert torch.autograd.gradcheck(lambda *_: scale_shift(x, scale, shift, index), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_rounds_once_and_sums_in_fp32(dtype):
    x, scale, shift = random(500, 9, dtype=dtype), random(9, seed=1), random(9, seed=2)
    exact = x.double() * scale.double() + shift.double()
    x.requires_grad_(), scale.requires_grad_(), shift.requires_grad_()
    y = scale_shift(x, scale, shift)
    assert_equal(y, exact.to(dtype), "y")
    dy = random(500, 9, seed=3, dtype=dtype)
    y.backward(dy)
    assert scale.grad.dtype == shift.grad.dtype == torch.float32
    assert_close(scale.grad, (dy.double() * x.double()).sum(0), atol=1e-4, what="scale")
    assert_close(shift.grad, dy.double().sum(0), atol=1e-4, what="shift")
    assert_equal(x.grad, (dy.double() * scale.double()).to(dtype), "x")


def kept_by(loss):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        y = loss()
    return kept, y


def test_only_a_scale_keeps_what_it_scales():
    x, scale, shift = random(5, 8).requires_grad_(), random(8, seed=1), random(8, seed=2).requires_grad_()
    kept, _ = kept_by(lambda: scale_shift(x, scale, shift))
    assert x.data_ptr() not in kept
    kept, _ = kept_by(lambda: scale_shift(x, scale.requires_grad_(), shift))
    assert x.data_ptr() in kept


@pytest.mark.parametrize("base", [None, "nf4"])
def test_ssf_keeps_no_input_of_a_linear(base):
    tuned = inlay.tune(llama(), inlay.SSF(target_modules=["down_proj"]), base=base).train()
    down = tuned.model.layers[0].mlp.down_proj
    x = random(3, 48).requires_grad_()
    kept, _ = kept_by(lambda: down(x))
    assert x.data_ptr() not in kept and kept


# --- norms -------------------------------------------------------------------------------------------------


class Gated(nn.RMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x) * (1 if gate is None else gate)


class Cubed(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x) * self.weight**2


@pytest.mark.parametrize(
    "norm, offset",
    [
        (nn.LayerNorm(6), 0.0),
        (nn.LayerNorm(6, bias=False), 0.0),
        (nn.RMSNorm(6), 0.0),
        (nn.LayerNorm(6, elementwise_affine=False), None),
        (nn.BatchNorm1d(6), None),
        (nn.GroupNorm(2, 6), None),
        (Gated(6), None),
        (Cubed(6), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_that_it_can_be_merged_into(norm, offset):
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    assert norm_offset(norm) == offset
    for name, tensor in norm.state_dict().items():
        assert_equal(tensor, before[name], name)


@pytest.mark.parametrize("name, offset", [("llama", 0.0), ("gemma", 1.0), ("t5", 0.0), ("gpt2", 0.0)])
def test_offsets_of_the_families(name, offset):
    tuned = inlay.tune(BY_NAME[name].build(), inlay.SSF())
    offsets = {piece.offset for piece in pieces_of(tuned, "default").values()}
    assert offsets == {None, offset}


# --- the method --------------------------------------------------------------------------------------------


def kinds(model, **options):
    return {path: type(piece) for path, piece in pieces_of(inlay.tune(model, inlay.SSF(**options)), "default").items()}


def test_shifts_stand_where_they_can_be_merged():
    found = kinds(BY_NAME["gpt2"].build())
    assert set(found.values()) == {ScaleShift} and "transformer.ln_f" in found and "lm_head" not in found
    assert set(kinds(llama()).values()) == {Scale}
    assert set(kinds(llama(), shift=True).values()) == {ScaleShift}
    assert set(kinds(BY_NAME["gpt2"].build(), shift=False).values()) == {Scale}
    qwen = kinds(BY_NAME["qwen2"].build())
    assert qwen["model.layers.0.self_attn.q_proj"] is ScaleShift and qwen["model.layers.0.self_attn.o_proj"] is Scale


def test_targets_name_linears_or_norms():
    found = kinds(llama(), target_modules=["q_proj", "post_attention_layernorm"], layers_to_transform=1)
    assert sorted(found) == ["model.layers.1.post_attention_layernorm", "model.layers.1.self_attn.q_proj"]
    found = kinds(llama(), exclude_modules=["input_layernorm", "norm"])
    assert not any(path.endswith(("input_layernorm", "model.norm")) for path in found)


def test_an_odd_norm_is_named_and_left_alone():
    model = llama()
    model.model.layers[0].input_layernorm.__class__ = type(
        "GatedNorm", (Gated,), {"normalized_shape": (32,), "eps": 1e-6}
    )
    with pytest.warns(UserWarning, match="1 norms .GatedNorm, first model.layers.0.input_layernorm"):
        assert "model.layers.0.input_layernorm" not in kinds(model)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_shift_without_a_bias_cannot_be_merged(in_place, tmp_path):
    tuned = shake(inlay.tune(llama(), inlay.SSF(shift=True)))
    wanted = eval_logits(tuned, text_batch(0))
    with pytest.raises(ValueError, match=r'layernorm: a shift.*needs a bias.*shift="mergeable"|q_proj: a shift.*'):
        inlay.merge(tuned, in_place=in_place)
    assert_equal(eval_logits(tuned, text_batch(0)), wanted, "nothing has changed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "opt"])
def test_on_disk_it_is_merged_as_in_memory(name, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    from inlay.adapters import merge_files

    model = BY_NAME[name].build().to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tuned = shake(inlay.tune(model, inlay.SSF()))
    tuned.save_pretrained(tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    for key, tensor in inlay.merge(tuned).state_dict().items():
        assert_equal(loaded.state_dict()[key], tensor, key)


def test_pieces_are_nested_as_they_are_merged():
    """Whichever is activated first: scaling what another adapter added, or adding to what was scaled."""
    for order in (["ssf", "lora"], ["lora", "ssf"], ["ssf", "second", "lora"]):
        tuned = inlay.tune(llama(), inlay.SSF(), adapter_name="ssf")
        inlay.tune(shake(tuned, seed=1), inlay.SSF(), adapter_name="second")
        inlay.tune(shake(tuned, seed=2), inlay.LoRA(r=4), adapter_name="lora")
        shake(tuned, seed=3).set_adapter(order)
        wanted = eval_logits(tuned, text_batch(0))
        assert_close(eval_logits(inlay.merge(tuned), text_batch(0)), wanted, atol=1e-4, what=str(order))


def test_what_cannot_be_meant():
    with pytest.raises(ValueError, match="shift: wanted one of .'mergeable',., got 'maybe'"):
        inlay.SSF(shift="maybe")
    with pytest.raises(ValueError, match="target 'o_projj' matched no linear.*did you mean 'o_proj'"):
        inlay.tune(llama(), inlay.SSF(target_modules=["o_projj"]))
