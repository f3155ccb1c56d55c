"""Changes of a table of embeddings: what they compute, train, keep and refuse."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_close, assert_equal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inlay.nn.tuned_output import hold_outputs
from inlay.pieces.embedding import EmbeddingLowRank, EmbeddingRows, places_of
from inlay.pieces.lookup import lookup_of
from inlay.pieces.token_rows import TokenEmbeddings

V, H = 400, 8
ROWS = torch.tensor([301, 7, 12, 399])


class Scaled(nn.Embedding):
    """As Gemma has it."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(3.3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def table(kind=nn.Embedding, dtype=torch.float32, **options) -> nn.Embedding:
    torch.manual_seed(0)
    return kind(V, H, **options).to(dtype).requires_grad_(False)


def some_ids(seed: int = 0) -> Tensor:
    """[3, 11], every trained row among them more than once."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (3, 11), generator=random)
    ids[:2, :4] = ROWS
    return ids


def shaken(piece: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in piece.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return piece


KINDS = {
    "rows": lambda module: EmbeddingRows(module, ROWS),
    "tokens": lambda module: TokenEmbeddings(module, ROWS),
    "low-rank": lambda module: EmbeddingLowRank(module, 3, 1.7),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def held(kind: str, module: nn.Embedding):
    tuned = hold_outputs(module)
    tuned.add_delta("one", shaken(KINDS[kind](module)))
    tuned.activate(("one",))
    return tuned, tuned.deltas["one"]


@every_kind
@pytest.mark.parametrize("options", [{}, {"padding_idx": 7}, {"kind": Scaled}, {"kind": Scaled, "padding_idx": 12}])
def test_it_trains_as_a_table_with_the_change_in_it(kind, options):
    """Gradients are those that autograd finds through a merged table, also where one row gets none."""
    ids, tuned = some_ids(), None
    tuned, piece = held(kind, table(**options))
    plain = table(**options)
    weight = torch.randn(3, 11, H)
    (tuned(ids) * weight).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in piece.named_parameters()}
    piece.zero_grad()
    merged, _ = piece.merge(plain.weight, None)
    wanted = torch.func.functional_call(plain, {"weight": merged}, ids)
    assert_close(tuned(ids).detach(), wanted.detach(), atol=2e-6, what="output")
    (wanted * weight).sum().backward()
    for name, parameter in piece.named_parameters():
        assert bool(parameter.grad.any())
        assert_close(ours[name], parameter.grad, atol=1e-5 * float(parameter.grad.abs().max()), what=name)


@every_kind
def test_it_begins_as_the_table_itself(kind):
    module = table(torch.nn.Embedding, torch.bfloat16)
    before = module(some_ids())
    tuned = hold_outputs(module)
    tuned.add_delta("one", KINDS[kind](module))
    tuned.activate(("one",))
    assert not tuned.deltas["one"].changes_anything()
    assert_equal(tuned(some_ids()), before, "output")


@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_sixteen_bits_are_rounded_once(kind):
    tuned, piece = held(kind, table(dtype=torch.bfloat16))
    merged, _ = piece.merge(tuned.weight, None)
    assert merged.dtype == torch.bfloat16
    assert_equal(tuned(some_ids()), nn.functional.embedding(some_ids(), merged), "output")


class _Largest(TorchDispatchMode):
    """The largest tensor, in elements, that an op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_no_tensor_of_the_tables_size_is_made(kind):
    """Nor is anything kept for the backward but ids."""
    tuned, piece = held(kind, table())
    ids, kept = some_ids(), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with _Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tuned(ids).square().sum().backward()
    assert 0 < largest.numel <= max(ids.numel() * H, (len(ROWS) + 1) * H) < V * H
    floats = [tensor for tensor in kept if tensor.is_floating_point()]
    assert all(tensor.shape == (3, 11, H) for tensor in floats), "what square() keeps"
    assert {p.numel() for p in piece.parameters()} == {len(ROWS) * H}


@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_gradients_and_states_are_of_the_rows_alone(kind):
    tuned, piece = held(kind, table())
    optimizer = torch.optim.AdamW(piece.parameters(), lr=0.1)
    before, moved = tuned(torch.arange(V)).detach(), torch.zeros(V, dtype=torch.bool)
    tuned(some_ids()).square().sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert sum(t.numel() * t.element_size() for t in states) == 2 * len(ROWS) * H * 4
    moved[ROWS] = True
    changed = (tuned(torch.arange(V)).detach() != before).any(1)
    assert_equal(changed, moved, "rows that changed")


def test_the_low_rank_change_starts_as_pefts():
    piece = EmbeddingLowRank(table(), 3, 1.0, torch.Generator().manual_seed(1))
    assert not piece.lora_embedding_A.any() and piece.lora_embedding_A.shape == (3, V)
    assert piece.lora_embedding_B.shape == (H, 3) and 0.5 < float(piece.lora_embedding_B.detach().std()) < 1.6


def test_places():
    indices = torch.tensor([2, 5, 9])
    assert places_of(torch.tensor([[2, 3], [9, 12]]), indices).tolist() == [[0, 3], [2, 3]]
    assert places_of(torch.tensor([5], dtype=torch.int32), indices).tolist() == [1]


@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_sums_of_pieces(kind):
    module = table()
    one, two = shaken(KINDS[kind](module)), shaken(type(KINDS[kind](module))(module, torch.tensor([7, 99])))
    total = type(one).combine([(0.5, one), (2.0, two)], "here")
    weight = module.weight
    wanted = weight + 0.5 * (one.merge(weight, None)[0] - weight) + 2.0 * (two.merge(weight, None)[0] - weight)
    assert_close(total.merge(weight, None)[0].detach(), wanted.detach(), atol=1e-6, what="sum")
    assert total.s2ft_indices.tolist() == sorted({*ROWS.tolist(), 99})


class Squares(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).square()


class Positions(nn.Embedding):
    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        return super().forward(ids + past)


@pytest.mark.parametrize(
    "module, message",
    [
        (nn.Linear(3, 4), "wanted an nn.Embedding"),
        (nn.Embedding(5, 3, max_norm=1.0), "max_norm"),
        (Squares(5, 3), "something else than rows"),
        (Positions(5, 3), "other arguments"),
    ],
)
def test_what_is_no_plain_lookup_is_refused(module, message):
    with pytest.raises(ValueError, match=f"somewhere.*{message}"):
        lookup_of(module, "somewhere")


def test_a_packed_table_is_refused():
    module = table()
    module.weight = nn.Parameter(torch.zeros(V, H, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="stored packed.*dense embeddings"):
        EmbeddingRows(module, ROWS)


@pytest.mark.parametrize(
    "tokens, message",
    [([1, V], f"0 to {V - 1}.*got {V}.*resize_token_embeddings"), ([-1], "got -1"), ([3, 3], "distinct")],
)
def test_tokens_that_are_not_there_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingRows(table(), torch.tensor(tokens))
