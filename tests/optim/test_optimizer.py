"""inlay.optim.AdamW is torch's AdamW; any torch optimizer trains a tuned model, in both forms."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import assert_close, assert_equal, max_diff
from families import eval_logits, llama, text_batch
from oracle import randomize, train
from torch import nn

import inlay

SHAPES = [(1,), (7, 3), (113,), (64, 129), (203, 5), ()]


def parameters(seed=0):
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]


def set_gradients(params, seed, skip=()):
    random = torch.Generator().manual_seed(100 + seed)
    for i, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=random) * 10.0 ** (i - 3)
        p.grad = None if i in skip else gradient.to(p.dtype)


def assert_same(ours, wanted):
    for i, (p, q) in enumerate(zip(ours, wanted, strict=True)):
        assert_close(p, q, atol=1e-6, rtol=1e-6, what=f"parameter {i}")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.1, "weight_decay": 0.3},
        {"betas": (0.5, 0.8), "eps": 1e-3, "lr": 0.02},
        {"weight_decay": 0.0, "betas": (0.9, 0.0)},
    ],
)
def test_trajectory(options):
    """Against torch's own in float64; torch's error in fp32 is the measure of ours."""
    options = {"lr": 1e-3} | options
    ours, torchs, exact = parameters(), parameters(), [nn.Parameter(p.detach().double()) for p in parameters()]
    groups = {
        inlay.optim.AdamW(ours, **options): ours,
        torch.optim.AdamW(torchs, **options): torchs,
        torch.optim.AdamW(exact, **options): exact,
    }
    for step in range(20):
        for optimizer, params in groups.items():
            set_gradients(params, step)
            optimizer.step()
        for i, (p, q, e) in enumerate(zip(ours, torchs, exact, strict=True)):
            allowed = 2 * max_diff(q, e) + (step + 1) * 2**-23 * float(e.detach().abs().max())  # two roundings a step
            assert_close(p, e, atol=allowed, what=f"parameter {i} after step {step}")
    assert max_diff(ours[3], parameters()[3]) > 5e-3


def test_defaults_are_torchs():
    ours, torchs = inlay.optim.AdamW(parameters()).defaults, torch.optim.AdamW(parameters()).defaults
    assert {key: torchs[key] for key in ours} == ours


def test_groups_missing_gradients_and_schedules():
    """Parameters whose step counts differ, groups of their own, and a learning rate that changes."""
    results = []
    for cls in (inlay.optim.AdamW, torch.optim.AdamW):
        params = parameters()
        optimizer = cls(
            [
                {"params": params[:3], "lr": 0.05, "weight_decay": 0.5},
                {"params": params[3:], "betas": (0.7, 0.95), "eps": 1e-4},
            ],
            lr=0.01,
            weight_decay=0.0,
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
        for step in range(8):
            set_gradients(params, step, skip={step % 3, 4 if step < 5 else -1})
            optimizer.step()
            schedule.step()
        results.append(params)
    assert_same(*results)


def test_state_goes_back_and_forth_between_ours_and_torchs():
    """The same names and shapes of state: a run begun with one goes on with the other."""
    results = []
    for first, second in [
        (torch.optim.AdamW, torch.optim.AdamW),
        (inlay.optim.AdamW, torch.optim.AdamW),
        (torch.optim.AdamW, inlay.optim.AdamW),
        (inlay.optim.AdamW, inlay.optim.AdamW),
    ]:
        params = parameters()
        optimizer = first(params, lr=0.03)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        other = second(params, lr=0.5)
        other.load_state_dict({**state, "param_groups": [{**other.state_dict()["param_groups"][0], "lr": 0.03}]})
        for step in range(3, 6):
            set_gradients(params, step)
            other.step()
        results.append(params)
    for params in results[1:]:
        assert_same(params, results[0])


def test_own_state_round_trip_is_exact():
    params, twin = parameters(), parameters()
    one, other = inlay.optim.AdamW(params, lr=0.03), inlay.optim.AdamW(twin, lr=0.7)
    for step in range(3):
        set_gradients(params, step)
        one.step()
    with torch.no_grad():
        for p, q in zip(params, twin):
            q.copy_(p)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in range(3, 6):
        for group, optimizer in ((params, one), (twin, other)):
            set_gradients(group, step)
            optimizer.step()
    for p, q in zip(params, twin):
        assert_equal(q, p)


def test_closure_and_zero_learning_rate():
    params = parameters()
    optimizer = inlay.optim.AdamW(params, lr=0.0)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(sum((p**2).sum().item() for p in parameters()))
    for p, q in zip(params, parameters()):
        assert_equal(p, q)


def test_a_nan_gradient_shows():
    params = parameters()
    optimizer = inlay.optim.AdamW(params, lr=0.1)
    set_gradients(params, 0)
    params[3].grad[2, 4] = float("nan")
    optimizer.step()
    assert params[3].isnan().sum() == 1 and bool(params[3][2, 4].isnan())
    assert not any(bool(p.isnan().any()) for i, p in enumerate(params) if i != 3)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"lr": -1.0}, "lr, eps, weight_decay >= 0"),
        ({"eps": -1.0}, "lr, eps, weight_decay >= 0"),
        ({"weight_decay": float("nan")}, "lr, eps, weight_decay >= 0"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas": (0.9, -0.1)}, "betas"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        inlay.optim.AdamW(parameters(), **options)


def test_parameters_it_does_not_take():
    for p in (nn.Parameter(torch.randn(3).bfloat16()), nn.Parameter(torch.randn(3).double())):
        optimizer = inlay.optim.AdamW([p])
        p.grad = torch.ones_like(p)
        with pytest.raises(TypeError, match="fp32 parameters with dense gradients"):
            optimizer.step()
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="dense gradients"):
        inlay.optim.AdamW(embedding.parameters()).step()


# --- on a tuned model -------------------------------------------------------------------------------------

OPTIMIZERS = {
    "inlay AdamW": lambda p: inlay.optim.AdamW(p, lr=0.02),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.5),
}


@pytest.mark.parametrize("update", ["additive", "in_place"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains_in_both_forms(name, update):
    """In place, what the optimizer did must be in the weights by the next forward, also for optimizers that do not
    tell autograd (torch's fused ones)."""
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.3, update=update))
    optimizer = OPTIMIZERS[name]([p for p in tuned.parameters() if p.requires_grad])
    losses = train(tuned, optimizer, [text_batch(0)] * 12)
    assert losses[-1] < 0.9 * losses[0] and len(set(losses)) == 12
    logits = eval_logits(tuned, text_batch(0))
    assert_close(logits, eval_logits(inlay.merge(tuned), text_batch(0)), atol=1e-5, what="merged")
    fresh = inlay.tune(llama(), inlay.S2FT(ratio=0.3, update="additive"))
    for module, other in zip(tuned.modules(), fresh.modules()):
        if hasattr(module, "deltas"):
            other.deltas["default"].s2ft_values.data = module.deltas["default"].change()
    assert_close(logits, eval_logits(fresh, text_batch(0)), atol=1e-5, what="the same change, added")


@pytest.mark.parametrize("update", ["additive", "in_place"])
def test_clipping_and_scaling(update):
    tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.3, update=update))
    randomize(tuned, 0.1)
    trainable = [p for p in tuned.parameters() if p.requires_grad]
    tuned(**text_batch(0)).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trainable, 0.01)
    assert float(norm) > 0.01
    assert float(torch.stack([p.grad.norm() for p in trainable]).norm()) == pytest.approx(0.01, rel=1e-3)


# --- states of 8 bits -------------------------------------------------------------------------------------


def big_parameters():
    return [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i, shape in enumerate(BIG)]


BIG = [(4096,), (64, 129), (4095,), (7, 3)]  # the last two keep fp32 states


def test_8bit_states_and_their_size():
    params, plain = big_parameters(), big_parameters()
    ours, fp32 = inlay.optim.AdamW8bit(params, lr=0.1), inlay.optim.AdamW(plain, lr=0.1)
    for step in range(3):
        for group, optimizer in ((params, ours), (plain, fp32)):
            set_gradients(group, step)
            optimizer.step()
    for p, q in zip(params[2:], plain[2:]):
        assert_equal(p, q)
    for p, q in zip(params[:2], plain[:2]):
        state = ours.state[p]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8 and state["exp_avg"].shape == p.shape
        size = sum(t.nbytes for name, t in state.items() if name != "step")
        assert size <= 2.04 * p.numel() and 0 < max_diff(p, q) < 0.05


def test_8bit_resume_is_exact(tmp_path):
    params, twin = big_parameters(), big_parameters()
    one, other = inlay.optim.AdamW8bit(params, lr=0.03), inlay.optim.AdamW8bit(twin, lr=0.7)
    for step in range(3):
        set_gradients(params, step)
        one.step()
    torch.save((one.state_dict(), [p.detach() for p in params]), tmp_path / "checkpoint.pt")
    state, values = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    with torch.no_grad():
        for q, value in zip(twin, values):
            q.copy_(value)
    other.load_state_dict(state)
    for step in range(3, 6):
        for group, optimizer in ((params, one), (twin, other)):
            set_gradients(group, step)
            optimizer.step()
    for p, q in zip(params, twin):
        assert_equal(q, p)
        for name, t in one.state[p].items():
            assert other.state[q][name].dtype == t.dtype and torch.equal(other.state[q][name], t)


def test_8bit_states_are_not_taken_for_fp32_ones():
    params = big_parameters()
    optimizer = inlay.optim.AdamW8bit(params)
    set_gradients(params, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="got states of 8 bits; load them into AdamW8bit"):
        inlay.optim.AdamW(big_parameters()).load_state_dict(optimizer.state_dict())
    plain = inlay.optim.AdamW(params)
    plain.step()
    resumed = inlay.optim.AdamW8bit(params)
    resumed.load_state_dict(plain.state_dict())  # goes on with what was saved: fp32
    resumed.step()
    assert all("exp_avg_absmax" not in state for state in resumed.state.values())


def test_8bit_converges_as_fp32_does():
    losses = {}
    for cls, options in ((inlay.optim.AdamW, {}), (inlay.optim.AdamW8bit, {"min_8bit_size": 0})):
        tuned = inlay.tune(llama(), inlay.S2FT(ratio=0.3))
        optimizer = cls([p for p in tuned.parameters() if p.requires_grad], lr=0.02, **options)
        losses[cls] = train(tuned, optimizer, [text_batch(0)] * 30)
    plain, ours = losses.values()
    assert plain[-1] < 0.6 * plain[0]
    assert ours[-1] == pytest.approx(plain[-1], rel=0.05) and ours != plain
