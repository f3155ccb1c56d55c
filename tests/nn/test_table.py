"""Embeddings that train whole in 16 bits: their gradients are sums in fp32, rounded once."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import assert_equal
from families import FAMILIES, llama, text_batch
from torch import Tensor, nn

import inlay
from inlay.nn.table import look_up, row_sums

HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}


def exact(dy: Tensor, ids: Tensor, tokens: int, padding: int | None) -> Tensor:
    """The sums of rows by id, in fp64."""
    flat, rows = ids.reshape(-1), dy.reshape(-1, dy.shape[-1]).double()
    if padding is not None:
        rows = rows * (flat != padding)[:, None]
    return torch.zeros(tokens, dy.shape[-1], dtype=torch.float64).index_add_(0, flat, rows)


def assert_rounded_once(found: Tensor, wanted: Tensor, sizes: Tensor, what: str) -> None:
    """``found`` is ``wanted`` but for one rounding and for sums in fp32 of terms that add up to ``sizes``."""
    bound = HALF[found.dtype] * wanted.abs() + 1e-6 * sizes + 1e-7
    excess = (found.double() - wanted).abs() - bound
    assert bool((excess <= 0).all()), f"{what}: {float(excess.max()):.3e} beyond one rounding"


def frequent(shape: tuple[int, ...], tokens: int, seed: int) -> Tensor:
    """Ids of which one is half of all, and some never occur."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, max(1, tokens - 1), shape, generator=random)
    return ids.masked_fill(torch.rand(shape, generator=random) < 0.5, min(2, tokens - 1))


@pytest.mark.parametrize("padding", [None, 2, 0], ids=["no padding", "frequent padding", "padding"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape, tokens, width", [((4, 353), 4999, 5), ((7,), 3, 33), ((2, 3, 4), 24, 1), ((1,), 1, 8)])
def test_sums_are_rounded_once(shape, tokens, width, dtype, padding):
    padding = None if padding is None or padding >= tokens else padding
    ids = frequent(shape, tokens, len(shape) + tokens)
    dy = torch.randn(*shape, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = row_sums(dy, ids, tokens, padding)
    assert found.dtype == dtype and found.shape == (tokens, width)
    assert_rounded_once(found, exact(dy, ids, tokens, padding), exact(dy.abs(), ids, tokens, padding), "rows")
    assert_equal(
        row_sums(dy.transpose(-1, -2).contiguous().transpose(-1, -2), ids.int(), tokens, padding), found, "again"
    )


def test_many_ids_are_summed_a_few_columns_at_a_time(monkeypatch):
    ids, dy = frequent((40, 11), 2000, 0), torch.randn(40, 11, 200).to(torch.bfloat16)
    wanted = row_sums(dy, ids, 2000, 2)
    monkeypatch.setattr("inlay.nn.table._MOST", 1)
    assert_equal(row_sums(dy, ids, 2000, 2), wanted, "in parts")
    small, args = row_sums(dy, ids % 30, 30, 2), (dy, ids % 30, 30, 2)
    assert_rounded_once(small, exact(*args), exact(dy.abs(), *args[1:]), "a table smaller than the ids")


def test_torch_loses_a_percent_where_this_does_not():
    """What this is for: without it the bound above does not hold."""
    ids = frequent((1400,), 50, 0)
    dy = torch.rand(1400, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    wanted = exact(dy, ids, 50, None)
    lost = lambda grad: float(((grad.double() - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-9)).max())  # noqa: E731
    assert lost(torch.ops.aten.embedding_dense_backward(dy, ids, 50, -1, False)) > 1e-2
    assert lost(row_sums(dy, ids, 50, None)) < 3e-3


def test_no_ids_give_no_gradient():
    table = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True)
    look_up(table, torch.zeros(0, dtype=torch.int64), None).sum().backward()
    assert_equal(table.grad, torch.zeros_like(table), "gradient")


# --- in models ------------------------------------------------------------------------------------------------------


class Watch:
    """What flows back into every embedding of a model, and the ids it was asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda m, args, y, name=name: self.see(name, m, args, y))

    def see(self, name: str, module: nn.Module, args: tuple, y: Tensor) -> None:
        if y.requires_grad and args[0].dtype in (torch.int64, torch.int32):
            y.register_hook(lambda dy, ids=args[0]: self.calls.setdefault(name, []).append((ids, dy)))


def often(batch: dict) -> dict:
    """``batch`` with so many samples that its tokens recur."""
    return {key: torch.cat([value] * 40) for key, value in batch.items()}


def tied(model: nn.Module, name: str) -> bool:
    weight = model.get_submodule(name).weight
    return sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1


METHODS = [inlay.Full(), inlay.Full(rounding="fp32"), inlay.LISA(layers=1)]


@pytest.mark.parametrize("method", METHODS, ids=["full", "full fp32", "lisa"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if "input_ids" in f.batch(0)], ids=str)
def test_embeddings_of_a_model(family, method):
    model = inlay.tune(family.build().to(torch.bfloat16), copy.deepcopy(method)).train()
    watch = Watch(model)
    model(**often(family.batch(0))).loss.backward()
    found = 0
    for name, calls in watch.calls.items():
        module = model.get_submodule(name)
        if tied(model, name) or len(calls) != 1 or not hasattr(module, "inlay_lookup") or module.inlay_lookup is None:
            continue
        (ids, dy), scale = calls[0], module.inlay_lookup.scale(calls[0][1])
        dy = (dy * scale).detach()  # rounded as autograd rounds it
        args = (ids, module.num_embeddings, module.padding_idx)
        assert_rounded_once(module.weight.grad, exact(dy, *args), exact(dy.abs(), *args), name)
        found += 1
    if family.name in ("llama", "qwen2", "gpt2", "bert", "gemma-biases"):
        assert found, "no embedding was compared"


@pytest.mark.parametrize("family", [f for f in FAMILIES if "input_ids" in f.batch(0)], ids=str)
def test_a_forward_in_16_bits_is_the_same_bit_for_bit(family):
    plain = family.build().to(torch.bfloat16).train()
    tuned = inlay.tune(copy.deepcopy(plain), inlay.Full(), fused_blocks=False, fused_loss=False).train()
    for name, module in tuned.named_modules():
        if isinstance(module, nn.Embedding) and getattr(module, "inlay_lookup", None) is not None:
            ids = torch.tensor([[0, 5, 1], [1, 1, 3]]) % module.num_embeddings
            assert_equal(module(ids).detach(), plain.get_submodule(name)(ids).detach(), name)
            assert module(ids).grad_fn is not None


def test_what_torch_counts_otherwise_is_left_to_torch():
    """scale_grad_by_freq and max_norm mean what they mean without a method."""
    for options in ({"scale_grad_by_freq": True}, {"max_norm": 0.5}):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Embedding(9, 4, **options), nn.Linear(4, 3)).to(torch.bfloat16)
        tuned = inlay.tune(copy.deepcopy(plain), inlay.Full(target_modules=["0"]))
        ids = torch.tensor([[1, 1, 1, 4], [2, 8, 8, 1]])
        for model in (plain, tuned):
            model(ids).float().square().sum().backward()
        assert_equal(tuned[0].weight.grad, plain[0].weight.grad, str(options))


def test_in_one_compiled_graph():
    torch._dynamo.reset()
    model = inlay.tune(llama().to(torch.bfloat16), inlay.Full()).train()
    model(**text_batch(0)).loss.backward()
    wanted = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    assert torch._dynamo.explain(model)(**text_batch(0)).graph_break_count == 0
    torch.compile(model, backend="aot_eager", fullgraph=True)(**text_batch(0)).loss.backward()
    found = model.model.embed_tokens.weight.grad
    assert float((found.float() - wanted.float()).norm()) <= 0.05 * float(wanted.float().norm())
