"""LoFiT: gates and their penalty, choosing heads, offsets, and where they cannot be merged."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close, assert_equal
from families import BY_NAME, eval_logits, llama, text_batch
from methods import BIASES, shake, trainables

import inlay
from inlay.methods.lofit import largest
from inlay.select import gate_gradients
from inlay.state import pieces_of

O_PROJ = "model.layers.{}.self_attn.o_proj"


def test_an_offset_is_added_to_the_chosen_heads():
    tuned = inlay.tune(llama(), inlay.LoFiT(heads={O_PROJ.format(1): [0, 2]}))
    ((path, piece),) = pieces_of(tuned, "default").items()
    assert path == O_PROJ.format(1) and piece.lofit_channels.tolist() == [*range(8), *range(16, 24)]
    assert [name.rpartition(".")[2] for name in trainables(tuned)] == ["lofit_offset"]
    shake(tuned)
    seen = []
    tuned.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    eval_logits(tuned, text_batch(0))
    x, y = seen[0]
    full = torch.zeros(32).index_copy(0, piece.lofit_channels, piece.lofit_offset.detach())
    assert_close(y, (x + full) @ tuned.model.layers[1].self_attn.o_proj.weight.T, atol=1e-6, what="output")


def test_the_penalty_is_added_once_per_step_and_only_to_gates():
    """Whatever number of micro-batches a step is made of."""
    batches = [text_batch(seed) for seed in range(2)]
    for parts in (1, 2):
        grads = []
        for l1 in (0.0, 0.01):
            tuned = shake(inlay.tune(llama(), inlay.LoFiT(stage="gates", l1_lambda=l1, modules_to_save=["lm_head"])))
            optimizer = torch.optim.SGD(trainables(tuned.train()).values(), lr=0.0)
            for batch in batches[:parts]:
                (tuned(**batch).loss / parts).backward()
            optimizer.step()
            grads.append({name: p.grad.clone() for name, p in trainables(tuned).items()})
            held = trainables(tuned)
        for name, grad in grads[1].items():
            penalty = 0.01 * held[name].detach().sign() if "gate" in name else 0
            assert_close(grad, grads[0][name] + penalty, atol=1e-6, what=name)


def test_top_heads_are_those_with_the_largest_gates():
    tuned = inlay.tune(llama(), inlay.LoFiT(stage="gates"))
    gates = {path: piece.lofit_gate.data for path, piece in pieces_of(tuned, "default").items()}
    assert {gate.numel() for gate in gates.values()} == {32}
    gates[O_PROJ.format(0)][24:] = -3.0
    gates[O_PROJ.format(1)][8:16] = 2.0
    gates[O_PROJ.format(1)][16] = 9.0  # ‖·‖ = 9 against 5.7 and 8.5
    assert inlay.LoFiT.top_heads(tuned, 1) == {O_PROJ.format(1): [2]}
    assert inlay.LoFiT.top_heads(tuned, 0.25) == {O_PROJ.format(0): [3], O_PROJ.format(1): [2]}
    assert inlay.LoFiT.top_heads(tuned, 3) == {O_PROJ.format(0): [3], O_PROJ.format(1): [1, 2]}
    chosen = inlay.tune(llama(), inlay.LoFiT(heads=inlay.LoFiT.top_heads(tuned, 3)))
    assert len(pieces_of(chosen, "default")) == 2
    with pytest.raises(ValueError, match="wanted 1 to 8 heads, which is all there are, got 9"):
        inlay.LoFiT.top_heads(tuned, 9)
    with pytest.raises(ValueError, match='has no gates: wanted a model tuned by LoFiT.stage="gates".'):
        inlay.LoFiT.top_heads(chosen)


def test_ties_go_to_the_first():
    assert largest({"a": torch.ones(3), "b": torch.ones(3)}, 0.5) == {"a": [0, 1, 2]}


@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_gradients_of_gates_are_what_training_them_would_see(name, base):
    family = BY_NAME[name]
    tuned = inlay.tune(family.build(), inlay.LoFiT(stage="gates", l1_lambda=0), base=base).eval()
    batches = [family.batch(seed) for seed in range(2)]
    for batch in batches:
        tuned(**batch).loss.backward()
    wanted = {path: piece.lofit_gate.grad for path, piece in pieces_of(tuned, "default").items()}
    before = {key: p.requires_grad for key, p in tuned.named_parameters()}
    with inlay.disabled(tuned):
        found = gate_gradients(tuned, list(wanted), batches)
    assert {key: p.requires_grad for key, p in tuned.named_parameters()} == before
    for path, grad in wanted.items():
        assert_close(found[path], grad, atol=1e-5 * float(grad.abs().max()), what=path)


def test_heads_are_chosen_by_gradient():
    calibration = [text_batch(seed) for seed in range(2)]
    tuned = inlay.tune(llama(), inlay.LoFiT(heads=2), calibration=calibration)
    grads = gate_gradients(llama(), [O_PROJ.format(0), O_PROJ.format(1)], calibration)
    norms = torch.cat([grad.reshape(4, 8).norm(dim=1) for grad in grads.values()])
    best = sorted(norms.topk(2).indices.tolist())
    found = {
        (path, channel // 8)
        for path, piece in pieces_of(tuned, "default").items()
        for channel in piece.lofit_channels.tolist()
    }
    assert found == {(O_PROJ.format(head // 4), head % 4) for head in best}
    with pytest.raises(ValueError, match="wants calibration data, got none"):
        inlay.tune(llama(), inlay.LoFiT())


def test_without_a_bias_an_offset_cannot_be_merged(tmp_path):
    tuned = shake(inlay.tune(llama(), inlay.LoFiT(heads=0.5, strategy="random")))
    wanted = eval_logits(tuned, text_batch(0))
    for in_place in (False, True):
        with pytest.raises(ValueError, match=r"o_proj: an offset of heads is merged into the bias.*has none"):
            inlay.merge(tuned, in_place=in_place)
    assert_equal(eval_logits(tuned, text_batch(0)), wanted, "nothing has changed")
    tuned.save_pretrained(tmp_path)
    assert_equal(eval_logits(inlay.load(llama(), tmp_path), text_batch(0)), wanted, "loaded")


def test_offsets_add_up():
    tuned = inlay.tune(llama(**BIASES), inlay.LoFiT(heads={O_PROJ.format(0): [0, 1]}), adapter_name="a")
    inlay.tune(shake(tuned, seed=1), inlay.LoFiT(heads={O_PROJ.format(0): [1, 3]}), adapter_name="b")
    shake(tuned, seed=2)
    tuned.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    tuned.set_adapter(["a", "b"])
    both = eval_logits(tuned, text_batch(0))
    tuned.set_adapter("sum")
    assert_close(eval_logits(tuned, text_batch(0)), both, atol=1e-5, what="sum")
    assert pieces_of(tuned, "sum")[O_PROJ.format(0)].lofit_channels.numel() == 24


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 0}, "heads: wanted a number of heads, 1 or more, or a fraction"),
        ({"heads": 1.5}, "or a fraction in"),
        ({"heads": {}}, "heads: wanted some heads"),
        ({"heads": {"a": [1]}, "stage": "gates"}, 'of stage="offsets"'),
        ({"stage": "scales"}, "stage: wanted one of"),
        ({"l1_lambda": -1.0}, "l1_lambda: wanted a weight of 0 or more"),
    ],
)
def test_what_no_model_can_take(options, message):
    with pytest.raises(ValueError, match=message):
        inlay.LoFiT(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 9, "strategy": "random"}, "wanted 1 to 8 heads, which is all there are, got 9"),
        ({"heads": {"model.layers.0.mlp.down_proj": [0]}}, "'model.layers.0.mlp.down_proj' is no attention output"),
        ({"heads": {O_PROJ.format(0): [4]}}, "wanted distinct heads of .* from 0 to 3"),
        ({"heads": {O_PROJ.format(0): [1, 1]}}, "wanted distinct heads"),
    ],
)
def test_what_this_model_cannot_take(options, message):
    with pytest.raises(ValueError, match=message):
        inlay.tune(llama(), inlay.LoFiT(**options))
