"""Where weights train whole the backward does what they need and no more: counted products, counted bytes, after every
redraw, and under both forms of checkpointing."""

from __future__ import annotations

from weakref import ref

import pytest
import torch
from families import llama, text_batch
from methods import trainables
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import inlay
from inlay.sites import block_of, blocks_of

LAYERS, BATCH = 4, text_batch(0)
TOKENS = BATCH["input_ids"].numel()


def build() -> nn.Module:
    return llama(num_hidden_layers=LAYERS)


def tune(method) -> nn.Module:
    return inlay.tune(build(), method, fused_blocks=False, fused_loss=False).train()


def step_flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**BATCH).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def forward_flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**BATCH)
    return counter.get_total_flops()


def product(weight: torch.Tensor) -> int:
    return 2 * TOKENS * weight.numel()


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that are multiplied: all matrices but the embedding, which is looked up."""
    return {name: p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name}


@pytest.mark.parametrize("method", [inlay.LISA(layers=1), inlay.HFT(outside=True)], ids=["lisa", "hft"])
def test_with_embeddings_no_weight_gradient_of_a_frozen_matrix_exists(method):
    """dX passes every block; of the products with dW exactly the frozen ones are missing."""
    model = tune(method)
    full = step_flops(tune(inlay.Full()))
    got = step_flops(model)
    frozen = [p for p in matrices(model).values() if not p.requires_grad]
    assert frozen and got == full - sum(product(p) for p in frozen)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_below_the_frozen_blocks_there_is_no_backward(count):
    """Full: every block alike, and the head. Here: ``count`` blocks, down to the norm that the lowest begins with."""
    full, got = step_flops(tune(inlay.Full())), step_flops(model := tune(inlay.FreezeLayers(layers=count)))
    forward, head = forward_flops(model), 2 * product(model.lm_head.weight)
    block = (full - forward - head) // LAYERS
    assert (full - forward - head) % LAYERS == 0
    assert got == forward + head + count * block


class Box:
    """What autograd keeps in place of a tensor: alive as long as the graph keeps it."""

    def __init__(self, tensor: torch.Tensor, block: int | None) -> None:
        self.tensor, self.block = tensor, block


def kept_by_block(model: nn.Module, batch) -> list[int]:
    """Bytes that are kept for the backward of each block when the forward is done, each storage once, weights aside."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    where: list[int | None] = [None]
    boxes: list[ref[Box]] = []
    handles = []
    for index, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, index=index: where.__setitem__(0, index)))
        handles.append(layer.register_forward_hook(lambda *_: where.__setitem__(0, None)))

    def pack(tensor):
        box = Box(tensor, where[0])
        boxes.append(ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        loss = model(**batch).loss
    kept = [0] * LAYERS
    for box in (held() for held in boxes):
        if box is not None and box.block is not None and box.tensor.untyped_storage().data_ptr() not in known:
            kept[box.block] += box.tensor.untyped_storage().nbytes()
    loss.backward()
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize(
    "method",
    [
        inlay.FreezeLayers(layers=2),
        inlay.Telly(frozen_layers=3),
        inlay.LISA(layers=1, every=1, embeddings=False),
        inlay.HFT(redraw_every=1, layers_to_transform=[2, 3]),
        inlay.LISA(layers=1, every=1, layers_to_transform=[1, 2, 3]),
    ],
    ids=["freeze", "telly", "lisa", "hft", "lisa-upper"],
)
def test_nothing_is_kept_below_what_trains_at_each_step(method, checkpointing):
    model = inlay.tune(build(), method).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    parameters = list(trainables(model).values())
    optimizer = inlay.optim.AdamW(parameters, lr=1e-3)
    lowest_ever = set()
    for seed in range(8):
        optimizer.zero_grad()
        kept = kept_by_block(model, text_batch(seed))
        blocks = blocks_of(model)
        inside = [blocks.index(b) for n in trainables(model) if (b := block_of(n, blocks)) is not None]
        lowest = min(inside)
        lowest_ever.add(lowest)
        assert not any(kept[:lowest]), (lowest, kept)
        assert all(kept[lowest:]), (lowest, kept)
        for name, parameter in trainables(model).items():
            assert parameter.grad is not None and bool(parameter.grad.any()), name
        optimizer.step()
    if isinstance(method, inlay.LISA):
        assert len(lowest_ever) > 1  # it was drawn again


@pytest.mark.parametrize("name", ["BitFit", "LNTuning", "SSF"])
def test_vectors_keep_no_input_of_a_frozen_product(name):
    """Not even those of the MLP's down projection, which nothing but its weight's gradient would want."""
    model = llama(num_hidden_layers=2, attention_bias=True, mlp_bias=True)
    model = inlay.tune(model, getattr(inlay, name)(), fused_blocks=False).train()
    full = inlay.tune(llama(num_hidden_layers=2), inlay.Full(), fused_blocks=False).train()
    for tuned, wanted in ((model, 0), (full, 2)):
        inputs, held = [], set()
        for path, module in tuned.named_modules():
            if isinstance(module, nn.Linear) and path.endswith("down_proj"):
                module.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.append(args[0]))  # alive

        def pack(tensor, held=held):
            held.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = tuned(**BATCH).loss
        assert len(inputs) == 2 and sum(x.data_ptr() in held for x in inputs) == wanted
        del loss
