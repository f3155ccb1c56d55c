"""bf16 parameters under AdamW: with residuals the fp32 trajectory, at random the right mean; exact resumption."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import assert_equal
from families import llama, text_batch
from torch import nn

import inlay
from inlay.ops.adamw_bf16 import join_residual

SHAPES = [(1,), (7, 3), (5000,), (64, 129), ()]
ROUNDINGS = pytest.mark.parametrize("rounding", ["residual", "stochastic"])
KINDS = pytest.mark.parametrize("kind", [inlay.optim.AdamW, inlay.optim.AdamW8bit])


def parameters(dtype=torch.bfloat16, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=random).bfloat16().to(dtype)) for shape in SHAPES]


def set_gradients(params, seed, skip=()):
    random = torch.Generator().manual_seed(100 + seed)
    for i, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=random).bfloat16() * 10.0 ** (i - 2)
        p.grad = None if i in skip else gradient.to(p.dtype)


def steps(optimizer, params, numbers, skip=()):
    for number in numbers:
        set_gradients(params, number, skip)
        optimizer.step()


def assert_all_equal(ours, wanted):
    for i, (p, q) in enumerate(zip(ours, wanted, strict=True)):
        assert_equal(p, q, what=f"parameter {i}")


def masters(optimizer, params):
    return [join_residual(p, optimizer.state[p]["residual"]) for p in params]


@KINDS
def test_with_residuals_it_is_the_optimizer_of_fp32_parameters(kind):
    ours, wide = parameters(), parameters(torch.float32)
    optimizer, plain = kind(ours, lr=1e-4, rounding="residual"), kind(wide, lr=1e-4)
    for number in range(20):
        steps(optimizer, ours, [number])
        steps(plain, wide, [number])
        assert_all_equal(masters(optimizer, ours), wide)
    for p, q in zip(ours, wide, strict=True):
        for name, t in plain.state[q].items():
            assert_equal(optimizer.state[p][name], t, what=name)
    assert all(optimizer.state[p]["residual"].dtype == torch.int16 for p in ours)


@ROUNDINGS
def test_a_model_trained_in_full(rounding):
    """Every weight of a bf16 model; with residuals they are what an fp32 copy becomes by the same gradients."""
    model = llama().bfloat16()
    params = list(model.parameters())
    copies = [nn.Parameter(p.detach().float()) for p in params]
    optimizer = inlay.optim.AdamW(params, lr=1e-3, rounding=rounding)
    plain = inlay.optim.AdamW(copies, lr=1e-3)
    losses = []
    for _ in range(12):
        loss = model(**text_batch(0)).loss
        loss.backward()
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    if rounding == "residual":
        assert_all_equal(masters(optimizer, params), copies)
    assert all("residual" in state for state in optimizer.state.values()) == (rounding == "residual")


@ROUNDINGS
def test_updates_below_the_spacing_of_bf16_arrive(rounding):
    """60 steps of 1e-5 at 1.0, where bf16 numbers are 7.8e-3 apart: torch's AdamW stays where it is."""
    moved = {}
    for name, make in (
        ("ours", lambda p: inlay.optim.AdamW(p, lr=1e-5, weight_decay=0.0, rounding=rounding)),
        ("torch", lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0)),
    ):
        p = nn.Parameter(torch.ones(100_000).bfloat16())
        optimizer = make([p])
        for _ in range(60):
            p.grad = -torch.ones_like(p)
            optimizer.step()
        values = masters(optimizer, [p])[0] if name == "ours" and rounding == "residual" else p.detach()
        moved[name] = float(values.double().mean()) - 1
    assert moved["torch"] == 0
    sigma = 1e-6 if rounding == "residual" else (60 * 1e-5 * 2**-7 / 100_000) ** 0.5
    assert abs(moved["ours"] - 60e-5) < 4 * sigma < 6e-5


@ROUNDINGS
@KINDS
def test_resume_is_exact(kind, rounding, tmp_path):
    """torch would cast states, and the residual with them, to bf16."""
    params, twin = parameters(), parameters(seed=1)
    one = kind(params, lr=0.03, rounding=rounding, seed=5)
    other = kind(twin, lr=0.7, rounding=rounding, seed=5)
    steps(one, params, range(3))
    torch.save((one.state_dict(), [p.detach() for p in params]), tmp_path / "checkpoint.pt")
    state, values = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    with torch.no_grad():
        for q, value in zip(twin, values, strict=True):
            q.copy_(value)
    other.load_state_dict(state)
    for p, q in zip(params, twin, strict=True):
        for name, t in one.state[p].items():
            assert other.state[q][name].dtype == t.dtype, name
            assert_equal(other.state[q][name], t, what=name)
    for optimizer, group in ((one, params), (other, twin)):
        steps(optimizer, group, range(3, 6))
    assert_all_equal(twin, params)


def test_goes_on_from_torchs_own():
    """Its states are bf16, and it kept no residual: the masters begin at the parameters."""
    params = parameters()
    plain = torch.optim.AdamW(params, lr=0.01)
    steps(plain, params, range(2))
    optimizer = inlay.optim.AdamW(params, lr=0.01, rounding="residual")
    optimizer.load_state_dict(plain.state_dict())
    before = [p.detach().float() for p in params]
    steps(optimizer, params, [2])
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in params)
    for p, start in zip(masters(optimizer, params), before, strict=True):
        assert 0 < float((p - start).abs().max()) < 0.05


@ROUNDINGS
def test_beside_fp32_parameters(rounding):
    """Both dtypes in one group and in two, with gradients missing: each parameter goes its own way."""
    narrow, wide = parameters(), parameters(torch.float32, seed=1)
    alone, other = parameters(), parameters(torch.float32, seed=1)
    mixed = inlay.optim.AdamW([{"params": narrow + wide[:2], "lr": 0.02}, {"params": wide[2:]}], rounding=rounding)
    apart = inlay.optim.AdamW(alone, lr=0.02, rounding=rounding)
    plain = inlay.optim.AdamW([{"params": other[:2], "lr": 0.02}, {"params": other[2:]}])
    for number in range(4):
        for optimizer, groups in ((mixed, (narrow, wide)), (apart, (alone,)), (plain, (other,))):
            for group in groups:
                set_gradients(group, number, skip={number, 1})
            optimizer.step()
    assert_all_equal(narrow, alone)
    assert_all_equal(wide, other)


def test_random_numbers_depend_on_place_and_seed_alone():
    """Not on which other parameters take the step, nor on the groups they are in; but on the seed."""
    results = {}
    for name, skip, seed in (("all", (), 0), ("some", (0, 1, 4), 0), ("groups", (), 0), ("seed", (), 1)):
        params = parameters()
        groups = [{"params": params[:3]}, {"params": params[3:]}] if name == "groups" else params
        optimizer = inlay.optim.AdamW(groups, lr=0.01, rounding="stochastic", seed=seed)
        steps(optimizer, params, range(2), skip)
        results[name] = params[2:4]
    for name in ("some", "groups"):
        assert_all_equal(results[name], results["all"])
    assert not torch.equal(results["seed"][0], results["all"][0])
    twins = [nn.Parameter(torch.ones(5000).bfloat16()) for _ in range(2)]
    optimizer = inlay.optim.AdamW(twins, lr=1e-3, rounding="stochastic")
    for p in twins:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(*twins), "two parameters rounded by the same numbers"


def test_fp32_gradients_of_bf16_parameters():
    ours, wanted = parameters(), parameters()
    narrow, wide = (inlay.optim.AdamW(group, lr=0.01, rounding="residual") for group in (wanted, ours))
    steps(narrow, wanted, range(2))
    for p in ours:
        p.grad_dtype = torch.float32
    for number in range(2):
        set_gradients(wanted, number)
        for p, q in zip(ours, wanted, strict=True):
            p.grad = q.grad.float()
        wide.step()
    assert_all_equal(ours, wanted)


def test_a_copy_keeps_its_options():
    params = parameters()
    optimizer = inlay.optim.AdamW8bit(params, min_8bit_size=100, rounding="stochastic", seed=9)
    steps(optimizer, params, [0])
    twin = copy.deepcopy(optimizer)
    copies = twin.param_groups[0]["params"]
    for one, group in ((optimizer, params), (twin, copies)):
        steps(one, group, [1])
    assert_all_equal(copies, params)
    assert (twin.rounding, twin.seed, twin.min_8bit_size) == ("stochastic", 9, 100)


@KINDS
def test_what_is_refused(kind):
    with pytest.raises(ValueError, match='rounding: wanted None, "residual" or "stochastic", got \'nearest\''):
        kind(parameters(), rounding="nearest")
    with pytest.raises(ValueError, match="seed: wanted an integer of 64 bits"):
        kind(parameters(), rounding="stochastic", seed=1 << 63)
    params = parameters()
    with pytest.raises(TypeError, match=rf'got torch.bfloat16, .*pass {kind.__name__}\(..., rounding="residual"'):
        steps(kind(params), params, [0])
    half = [nn.Parameter(torch.randn(3).half())]
    with pytest.raises(TypeError, match="fp32 or bf16 parameters with dense gradients, got torch.float16"):
        steps(kind(half, rounding="residual"), half, [0])
    optimizer = kind(params, rounding="residual")
    steps(optimizer, params, [0])
    state = optimizer.state_dict()
    for group, rounding in ((params, "stochastic"), (params, None), (parameters(torch.float32), "residual")):
        with pytest.raises(ValueError, match='load it with rounding="residual" and the bf16 parameters'):
            kind(group, rounding=rounding).load_state_dict(state)
