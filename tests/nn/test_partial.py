"""Partial backpropagation: what is recorded, kept and recomputed, with and without gradient checkpointing."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from comparing import assert_close
from families import BY_NAME, FAMILIES, TOKENS, llama, text_batch
from oracle import deltas_of, randomize
from torch import nn

import inlay
from inlay.nn.partial import first_trained_block, stops_backprop
from inlay.sites import block_stacks

HIDDEN, INTERMEDIATE, HEADS, HEAD = 32, 56, 4, 8
KV = 2 * HEAD
ROWS = 3
#: Down to nothing below the last of three layers.
LAST = [2]


def small_llama(**changes):
    """Three layers, every width told from the others."""
    return llama(num_hidden_layers=3, intermediate_size=INTERMEDIATE, **changes)


class Kept:
    """What autograd keeps during a forward: shapes and bytes by layer, each storage once, parameters left out."""

    def __init__(self, model, layers):
        self.frozen = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        self.layer, self.handles, self.calls = None, [], 0
        self.shapes, self.bytes = defaultdict(list), defaultdict(int)
        self.seen, self.alive = set(), []
        for index, layer in enumerate(layers):
            self.handles.append(layer.register_forward_pre_hook(lambda *_, index=index: setattr(self, "layer", index)))
            self.handles.append(layer.register_forward_hook(lambda *_: setattr(self, "layer", None)))

    def pack(self, tensor):
        key = tensor.untyped_storage().data_ptr()
        self.alive.append(tensor)  # so that no address is used twice
        if self.layer is not None and key not in self.frozen:
            self.calls += 1
        if key not in self.frozen and key not in self.seen:
            self.seen.add(key)
            self.shapes[self.layer].append(tuple(tensor.shape))
            self.bytes[self.layer] += tensor.untyped_storage().nbytes()
        return tensor

    def of(self, forward):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            result = forward()
        for handle in self.handles:
            handle.remove()
        return result


def kept_by(model, batch=None):
    kept = Kept(model, model.model.layers)
    kept.of(lambda: model(**(text_batch(0) if batch is None else batch))).loss.backward()
    return kept


def test_nothing_is_kept_below_the_first_trained_layer():
    tuned = inlay.tune(small_llama(), inlay.S2FT(ratio=0.2, layers_to_transform=LAST))
    flows = []
    for layer in tuned.model.layers:
        layer.register_forward_hook(lambda module, args, out: flows.append(out.requires_grad))
    kept = kept_by(tuned)
    assert flows == [False, False, True]
    assert kept.shapes[0] == kept.shapes[1] == [] and kept.bytes[2] > 0


@pytest.mark.parametrize("fused", [True, False])
def test_only_the_middle_layer_trained(fused):
    """Above it, activations flow back; below it, nothing is kept."""
    method = inlay.S2FT(ratio=0.2, layers_to_transform=1)
    kept = kept_by(inlay.tune(small_llama(), method, fused_blocks=fused))
    assert kept.shapes[0] == [] and kept.bytes[1] > 0 and kept.bytes[2] > 0


@pytest.mark.parametrize("update", ["additive", "in_place"])
@pytest.mark.parametrize("targets", [["down_proj"], ["o_proj", "down_proj"]])
def test_down_proj_keeps_gate_and_up_alone(targets, update):
    """Its input, act(gate)·up, is rebuilt in the backward: of that width only gate and up are kept."""
    tuned = inlay.tune(small_llama(), inlay.S2FT(ratio=0.2, target_modules=targets, update=update))
    kept = kept_by(tuned)
    for index in range(3):
        wide = [shape for shape in kept.shapes[index] if shape[-1] == INTERMEDIATE]
        assert wide == [(ROWS, TOKENS, INTERMEDIATE)] * 2, f"layer {index} keeps {kept.shapes[index]}"


@pytest.mark.parametrize("dtype, ratio", [(torch.float32, 0.85), (torch.bfloat16, 0.75)])
@pytest.mark.parametrize("update", ["additive", "in_place"])
def test_bytes_kept_per_layer(update, dtype, ratio):
    """Inputs of two norms, q, k, v, the attention's output, gate and up, and the chosen inputs of o_proj; in fp32 the
    norms' 1/rms and the attention's log-sums; once per model the rotary angles: nothing else."""
    method = inlay.S2FT(channels={"o_proj": HEAD, "down_proj": 5}, update=update)
    tuned = inlay.tune(small_llama().to(dtype), method)
    eager = inlay.tune(small_llama().to(dtype), method, fused_blocks=False)
    # Without a mask the attention op keeps none either.
    batch = {key: value for key, value in text_batch(0).items() if key != "attention_mask"}
    ours, theirs = kept_by(tuned, batch), kept_by(eager, batch)
    wide = 2 * HIDDEN + (HIDDEN + 2 * KV) + HIDDEN + 2 * INTERMEDIATE + HEAD
    bound = ROWS * TOKENS * (dtype.itemsize * wide + 4 * (2 + HEADS))
    angles = dtype.itemsize * 2 * TOKENS * HEAD
    for index in (1, 2):
        allowed = bound + (angles if index == 1 else 0)
        assert ours.bytes[index] <= allowed, f"layer {index}: {ours.bytes[index]} bytes, {ours.shapes[index]}"
        assert ours.bytes[index] <= ratio * theirs.bytes[index]


def test_a_frozen_layer_keeps_what_its_inputs_gradient_needs_alone():
    """A layer above the trained one has no values to train: not even the chosen inputs of o_proj are kept."""
    tuned = inlay.tune(small_llama(), inlay.S2FT(ratio=0.2, layers_to_transform=[0]))
    whole = inlay.tune(small_llama(), inlay.S2FT(ratio=0.2))
    assert kept_by(tuned).bytes[2] < kept_by(whole).bytes[2]


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("update", ["additive", "in_place"])
def test_a_linear_keeps_the_chosen_inputs_or_all_of_them(side, update):
    layer = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(40, 24))
    method = inlay.S2FT(channels=3, side=side, target_modules=["1"], update=update)
    tuned = inlay.tune(layer, method)
    kept = Kept(tuned, [tuned[1]])
    kept.of(lambda: tuned(torch.randn(5, 24)))
    assert [shape for shape in kept.shapes[0] if shape[-1] in (3, 40)] == [(5, 3 if side == "in" else 40)]


@pytest.mark.parametrize("update", ["additive", "in_place"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_all_that_is_kept_goes_through_save_for_backward(family, update):
    """A tensor left on a node's ctx escapes the count above, offloading hooks and the check for in-place changes."""
    tuned = inlay.tune(family.build(), inlay.S2FT(ratio=0.2, target_modules="all-linear", update=update))
    nodes, seen, own = [tuned(**family.batch(0)).loss.grad_fn], set(), 0
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        attributes = vars(node) if isinstance(node, torch.autograd.function.BackwardCFunction) else {}
        own += bool(attributes)
        for name, value in attributes.items():
            held = value if isinstance(value, list | tuple) else [value]
            assert not any(isinstance(item, torch.Tensor) for item in held), f"{type(node).__name__}.{name}"
    assert own >= len(deltas_of(tuned))


def test_eval_and_no_grad_keep_nothing():
    tuned = inlay.tune(small_llama(), inlay.S2FT(ratio=0.2))
    kept = Kept(tuned, tuned.model.layers)
    with torch.no_grad():
        kept.of(lambda: tuned(**text_batch(0)))
    assert not kept.seen


# --- gradient checkpointing -----------------------------------------------------------------------------


def count_calls(model) -> dict[int, int]:
    """How often each decoder layer's down_proj runs: once forward, once more if the layer is recomputed."""
    calls: dict[int, int] = defaultdict(int)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.register_forward_hook(lambda *_, index=index: calls.update({index: calls[index] + 1}))
    return calls


def enable_checkpointing(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layers, wanted", [(LAST, [1, 1, 2]), ([1], [1, 2, 2]), (None, [2, 2, 2])])
def test_checkpointing_recomputes_trained_layers_and_above_only(layers, wanted, reentrant):
    tuned = inlay.tune(small_llama(), inlay.S2FT(ratio=0.2, layers_to_transform=layers))
    enable_checkpointing(tuned, reentrant)
    tuned.enable_input_require_grads()  # what Trainer and PEFT do along with it
    calls = count_calls(tuned)
    tuned(**text_batch(0)).loss.backward()
    assert [calls[index] for index in range(3)] == wanted


def gradients_of(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("update", ["additive", "in_place"])
@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_checkpointed_gradients_are_the_same(family, layers, update, reentrant):
    tuned = inlay.tune(family.build(), inlay.S2FT(ratio=0.2, layers_to_transform=layers, update=update))
    randomize(tuned, 0.1)
    loss, wanted = gradients_of(tuned, family.batch(0))
    wanted = {name: gradient.clone() for name, gradient in wanted.items()}
    enable_checkpointing(tuned, reentrant)
    again, ours = gradients_of(tuned, family.batch(0))
    assert_close(again, loss, atol=1e-6, what="loss")
    for name, gradient in wanted.items():
        assert ours[name] is not None, f"{name} lost its gradient"
        # T5's encoder output collects gradients of several blocks in another order
        assert_close(ours[name], gradient, atol=5e-6 * float(gradient.abs().max()), what=name)


# --- where it stops -------------------------------------------------------------------------------------


def stopping_at(model):
    """Index of the block that stops backpropagation, for each one that does."""
    return [
        (name, index)
        for name, stack in block_stacks(model).items()
        for index, block in enumerate(stack)
        if stops_backprop(block)
    ]


def test_the_stop_moves_with_the_active_adapter():
    tuned = inlay.tune(small_llama(), inlay.S2FT(layers_to_transform=[2]), adapter_name="last")
    assert stopping_at(tuned) == [("model.layers", 2)]
    inlay.tune(tuned, inlay.S2FT(layers_to_transform=[1, 2]), adapter_name="more")
    assert stopping_at(tuned) == [("model.layers", 1)]
    tuned.set_adapter("last")
    assert stopping_at(tuned) == [("model.layers", 2)]
    tuned.set_adapter(["last", "more"])
    assert stopping_at(tuned) == [("model.layers", 1)]
    assert stopping_at(inlay.merge(tuned)) == []


def test_two_stacks_have_no_common_first_block():
    both = inlay.tune(BY_NAME["t5"].build(), inlay.S2FT())
    assert first_trained_block(both) is None and stopping_at(both) == []
    decoder = inlay.tune(BY_NAME["t5"].build(), inlay.S2FT(target_modules=r"decoder\..*\.wo"))
    assert stopping_at(decoder) == [("decoder.block", 0)]


def test_something_that_trains_below_the_blocks_still_gets_its_gradient():
    """Embeddings unfrozen by hand before an adapter is set: nothing is cut off."""
    tuned = inlay.tune(small_llama(), inlay.S2FT(layers_to_transform=LAST))
    tuned.model.embed_tokens.weight.requires_grad_(True)
    tuned.set_adapter("default")
    assert stopping_at(tuned) == []
    tuned(**text_batch(0)).loss.backward()
    assert bool(tuned.model.embed_tokens.weight.grad.any())


def test_a_stop_leaves_values_as_they_are():
    tuned = inlay.tune(small_llama(), inlay.S2FT(ratio=0.2, layers_to_transform=LAST))
    free = copy.deepcopy(tuned)
    from inlay.nn.mixed import unmix

    unmix(free.model.layers[2])
    assert stopping_at(tuned) and not stopping_at(free)
    tuned.enable_input_require_grads(), free.enable_input_require_grads()
    one, other = gradients_of(tuned, text_batch(0)), gradients_of(free, text_batch(0))
    assert float(one[0].detach()) == float(other[0].detach())
    for name, gradient in other[1].items():
        assert_close(one[1][name], gradient, atol=0, what=name)
    assert len(deltas_of(tuned)) == 2
