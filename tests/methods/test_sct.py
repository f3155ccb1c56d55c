"""SCT: the map against float64 and finite differences, which channels it takes, export, refusals."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close, assert_equal
from families import BY_NAME, eval_logits, llama, text_batch
from methods import BIASES, shake
from torch import nn

import inlay
from inlay.ops._registry import apply
from inlay.pieces.linear.channel_map import ChannelMap, ShiftedChannelMap, _MapChannels
from inlay.select import salience_scores
from inlay.state import pieces_of

O_PROJ = "model.layers.0.self_attn.o_proj"
BATCHES = [text_batch(seed) for seed in range(2)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 7), (0, 7)])
def test_gradients_are_those_of_finite_differences(shape, shift):
    y = random(*shape, dtype=torch.float64).requires_grad_()
    matrix = random(3, 3, seed=1, dtype=torch.float64).requires_grad_()
    bias = random(3, seed=2, dtype=torch.float64).requires_grad_() if shift else None
    channels = torch.tensor([0, 4, 5])
    inputs = [tensor for tensor in (y, matrix, bias) if tensor is not None]
    assert torch.autograd.gradcheck(lambda *_: apply(_MapChannels, y, matrix, bias, channels), inputs)
    wanted = y.clone()
    wanted[..., channels] = y[..., channels] + y[..., channels] @ matrix.T + (0 if bias is None else bias)
    assert_close(apply(_MapChannels, y, matrix, bias, channels), wanted, atol=1e-12, what="y")


def test_it_rounds_once_and_keeps_only_the_chosen_channels():
    y = random(50, 40, dtype=torch.bfloat16).requires_grad_()
    matrix, channels, kept = random(4, 4, seed=1).requires_grad_(), torch.tensor([1, 2, 20, 39]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = apply(_MapChannels, y, matrix, None, channels)
    exact = y.double()[:, channels] + y.double()[:, channels] @ matrix.double().T
    assert_close(out[:, channels], exact.to(torch.bfloat16), atol=0.0, rtol=2**-8, what="chosen")  # ties
    rest = [channel for channel in range(40) if channel not in channels.tolist()]
    assert_equal(out[:, rest], y[:, rest], "the others")
    assert max(tensor.numel() for tensor in kept if tensor.shape[:1] == (50,)) == 50 * 4


# --- which channels ----------------------------------------------------------------------------------------


def test_salience_is_the_norm_of_what_is_seen():
    model, seen = llama(), []
    handle = model.get_submodule(O_PROJ).register_forward_hook(lambda module, args, y: seen.append(y))
    for batch in BATCHES:
        model.eval()(**batch)
    handle.remove()
    rows = torch.cat([y[batch["attention_mask"].bool()] for y, batch in zip(seen, BATCHES, strict=True)])
    scores = salience_scores(model, [O_PROJ], BATCHES)[O_PROJ]
    assert_close(scores, rows.norm(dim=0), atol=1e-4, what="norms")
    tuned = inlay.tune(llama(), inlay.SCT(channels=5), calibration=BATCHES)
    best = rows.norm(dim=0).topk(5).indices.sort().values
    assert_equal(pieces_of(tuned, "default")[O_PROJ].sct_channels, best, "channels")


def test_classes_count_alike():
    """One class of a single sample weighs as much as one of many."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.eye(2)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, labels):
            return self.layer(x)

    x = torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 5.5]]).unsqueeze(1)
    batch = {"x": x, "labels": torch.tensor([0, 0, 1])}
    assert salience_scores(Model(), ["layer"], [batch])["layer"].tolist() == [2.5, 2.75]
    loose = {"x": x, "labels": torch.zeros(3, 1)}
    assert salience_scores(Model(), ["layer"], [loose])["layer"].tolist() == [5.0, 5.5]


def test_it_wants_data():
    with pytest.raises(ValueError, match="wants calibration data, got none"):
        inlay.tune(llama(), inlay.SCT())


def test_counts_and_places():
    tuned = inlay.tune(BY_NAME["gpt2"].build(), inlay.SCT(strategy="random"))
    pieces = pieces_of(tuned, "default")
    assert list(pieces) == ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]
    assert {piece.sct_map.shape for piece in pieces.values()} == {(4, 4)}  # an eighth of 32
    assert {type(piece) for piece in pieces.values()} == {ShiftedChannelMap}
    tuned = inlay.tune(llama(), inlay.SCT(strategy="random", target_modules=["down_proj"], channels=6))
    assert {type(piece) for piece in pieces_of(tuned, "default").values()} == {ChannelMap}


# --- merging and export ------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_a_shift_without_a_bias_cannot_be_merged(in_place):
    tuned = shake(inlay.tune(llama(), inlay.SCT(strategy="random", shift=True)))
    wanted = eval_logits(tuned, text_batch(0))
    with pytest.raises(ValueError, match="o_proj: the shift of a channel map is merged into a bias"):
        inlay.merge(tuned, in_place=in_place)
    assert_equal(eval_logits(tuned, text_batch(0)), wanted, "nothing has changed")


def test_a_bias_is_mixed_too_which_no_lora_says(tmp_path):
    for shift in ("mergeable", False):
        tuned = shake(inlay.tune(llama(**BIASES), inlay.SCT(strategy="random", shift=shift)))
        with pytest.raises(ValueError, match="is no exact LoRA; merge it instead"):
            inlay.export(tuned, tmp_path)


def test_factors_are_rows_of_the_weight():
    linear = nn.Linear(6, 8, bias=False)
    piece = ChannelMap(linear, torch.tensor([1, 5]))
    with torch.no_grad():
        piece.sct_map.copy_(random(2, 2))
    a, b = piece.lora_factors(lambda: linear.weight.detach())
    assert_equal(a, linear.weight.detach()[[1, 5]], "A")
    merged, _ = piece.merge(linear.weight, None)
    assert_close(b @ a, merged - linear.weight, atol=1e-6, what="B·A")


def test_files_in_another_order_say_the_same(tmp_path):
    from safetensors.torch import load_file, save_file

    tuned = shake(inlay.tune(llama(**BIASES), inlay.SCT(strategy="random")))
    tuned.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    flipped = {key: tensor.flip(*range(tensor.dim())).contiguous() for key, tensor in tensors.items()}
    save_file(flipped, path)
    again = inlay.load(llama(**BIASES), tmp_path)
    assert_equal(eval_logits(again, text_batch(0)), eval_logits(tuned, text_batch(0)), "logits")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": 0}, "channels: wanted a number of channels"),
        ({"channels": 1.5}, "or a fraction in"),
        ({"strategy": "weight"}, "strategy: wanted one of"),
        ({"shift": "always"}, "shift: wanted one of"),
        ({"channels": 33, "strategy": "random"}, "o_proj: wanted 1 to 32 channels, which is all it has"),
    ],
)
def test_what_cannot_be_meant(options, message):
    with pytest.raises(ValueError, match=message):
        inlay.tune(llama(), inlay.SCT(**options))
