"""The multi-tensor AdamW step against torch.optim.AdamW and a float64 run of it; 8-bit states against fp32 ones."""

import pytest
import torch
from _compare import assert_as_good, assert_bits

from inlay.ops import adamw_8bit_step_, adamw_step_
from inlay.ops.adamw import STATE_BLOCK, decode_state
from inlay.ops.quantize_blockwise import dynamic_map

SHAPES = [(1,), (7, 3), (113,), (203, 41), (0, 5), (20000,)]


def _torch_steps(params, all_grads, dtype, **options):
    copies = [p.to(dtype).clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(copies, **options)
    for grads in all_grads:
        for copy, grad in zip(copies, grads, strict=True):
            copy.grad = grad.to(dtype)
        optimizer.step()
    return copies, optimizer


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_against_torch(path, weight_decay):
    params = [torch.randn(shape) for shape in SHAPES]
    all_grads = [[torch.randn(shape) for shape in SHAPES] for _ in range(5)]
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    plain, _ = _torch_steps(params, all_grads, torch.float32, **options)
    exact, state64 = _torch_steps(params, all_grads, torch.float64, **options)
    ours = [p.clone() for p in params]
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for step, grads in enumerate(all_grads, start=1):
        doubled = [2 * g for g in grads]
        adamw_step_(ours, doubled, exp_avgs, exp_avg_sqs, 0.03, 0.8, 0.95, 1e-6, weight_decay, step, 0.5)
    for i, shape in enumerate(SHAPES):
        assert_as_good(ours[i], plain[i].detach(), exact[i].detach(), f"parameter {shape}", slack=2)
        if exact[i].numel():
            torch.testing.assert_close(exp_avgs[i], state64.state[exact[i]]["exp_avg"].float())
            torch.testing.assert_close(exp_avg_sqs[i], state64.state[exact[i]]["exp_avg_sq"].float())


def test_strided_parameters(path):
    base = torch.randn(6, 10)
    view, grad = base[:, ::2], torch.randn(6, 5)
    wanted = view.clone()
    states = [torch.zeros(6, 5) for _ in range(4)]
    before = base[:, 1::2].clone()
    adamw_step_([view], [grad.t().contiguous().t()], [states[0]], [states[1]], 0.1, 0.9, 0.99, 1e-8, 0.1, 1, 1.0)
    adamw_step_([wanted], [grad], [states[2]], [states[3]], 0.1, 0.9, 0.99, 1e-8, 0.1, 1, 1.0)
    torch.testing.assert_close(view, wanted)
    assert torch.equal(base[:, 1::2], before)


def test_tells_autograd(path):
    param = torch.nn.Parameter(torch.randn(4))
    version = param._version
    adamw_step_([param], [torch.ones(4)], [torch.zeros(4)], [torch.zeros(4)], 0.1, 0.9, 0.99, 1e-8, 0.0, 1, 1.0)
    assert param._version > version


def test_no_tensors_and_bad_input(path):
    adamw_step_([], [], [], [], 0.1, 0.9, 0.99, 1e-8, 0.0, 1, 1.0)
    p = torch.zeros(3)
    with pytest.raises(TypeError, match="wanted torch.float32"):
        adamw_step_([p], [p.bfloat16()], [p], [p], 0.1, 0.9, 0.99, 1e-8, 0.0, 1, 1.0)
    with pytest.raises(ValueError, match="one length"):
        adamw_step_([p], [], [p], [p], 0.1, 0.9, 0.99, 1e-8, 0.0, 1, 1.0)
    with pytest.raises(ValueError, match="step"):
        adamw_step_([p], [p], [p], [p], 0.1, 0.9, 0.99, 1e-8, 0.0, 0, 1.0)


# --- states of 8 bits -------------------------------------------------------------------------------------------------

SIZES_8BIT = [1, 255, 256, 257, 8195, 0]
DEFAULTS = (0.03, 0.8, 0.95, 1e-6, 0.1)  # lr, betas, eps, weight decay


def _coded(shape):
    """Zeroed states of 8 bits of one parameter."""
    blocks = -(-torch.Size(shape).numel() // STATE_BLOCK)
    codes = [torch.zeros(shape, dtype=torch.uint8) for _ in range(2)]
    return [*codes, torch.zeros(blocks), torch.zeros(blocks)]


def _step_8bit(params, grads, states, *scalars):
    adamw_8bit_step_(params, grads, *(list(column) for column in zip(*states, strict=True)), *scalars)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_maps_are_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(torch.device("cpu"), signed), functional.create_dynamic_map(signed))


def _points(signed):
    """In (0, 1]: every level, both neighbours of every midpoint, and more, from 1e-9 on; the largest is 1."""
    table = dynamic_map(torch.device("cpu"), signed)
    middle = (table[1:] + table[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(end)) for end in (-2.0, 2.0)]
    found = torch.cat((table, *near, 10 ** (-9 * torch.rand(4096))))
    return found[found.abs() <= 1] if signed else found[(found > 0) & (found <= 1)]


def test_codes_are_of_the_nearest_level(path):
    """With betas of 0 the states are g and g²: the kernels as encoders, against a search over all midpoints."""
    for signed in (True, False):
        points = _points(signed)
        grid = torch.nn.functional.pad(points, (0, -points.numel() % 255)).view(-1, 255)
        grid = torch.cat((grid, torch.ones(len(grid), 1)), dim=1)  # the last of each block: its scale
        blocks = grid if signed else grid.sqrt()
        states = _coded(blocks.shape)
        _step_8bit([torch.zeros_like(blocks)], [blocks], [states], 0.0, 0.0, 0.0, 1e-8, 0.0, 1, 1.0)
        exact = (blocks if signed else blocks * blocks).double()
        codes, absmax = states[0 if signed else 1].long(), states[2 if signed else 3]
        assert torch.equal(absmax, torch.ones(blocks.shape[0]))
        table = dynamic_map(torch.device("cpu"), signed).double()
        wanted = torch.bucketize(exact, (table[1:] + table[:-1]) / 2)
        wanted = wanted if signed else torch.where(exact > 0, wanted.clamp(min=1), wanted)
        off = (codes - wanted).abs()
        assert int(off.max()) <= 1
        nearest = (table[codes] - exact).abs() - (table[wanted] - exact).abs()
        assert float((nearest / exact.abs().clamp(min=1e-9)).max()) < 1e-6, "another level is nearer"
        assert float((off > 0).float().mean()) < 0.2  # half of the points sit beside a midpoint


def test_8bit_first_step_is_the_fp32_step(path):
    """States start at zero and the step is taken with the new ones before they are coded: nothing is lost yet."""
    params = [torch.randn(size) for size in SIZES_8BIT]
    grads = [torch.randn(size) for size in SIZES_8BIT]
    wanted, ours = [p.clone() for p in params], [p.clone() for p in params]
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    adamw_step_(wanted, grads, *zeros, *DEFAULTS, 1, 0.5)
    states = [_coded(p.shape) for p in params]
    _step_8bit(ours, grads, states, *DEFAULTS, 1, 0.5)
    for p, q, state, m, v in zip(ours, wanted, states, *zeros, strict=True):
        assert_bits(p, q)
        # Within a decade neighbours are at most 0.9/intervals of it apart; below the last decade the gap is relative.
        for codes, absmax, exact, signed in ((state[0], state[2], m, True), (state[1], state[3], v, False)):
            assert_bits(absmax, torch.stack([b.abs().max() for b in exact.split(STATE_BLOCK)]) if p.numel() else absmax)
            error = (decode_state(codes, absmax, signed) - exact).abs()
            scale = absmax.repeat_interleave(STATE_BLOCK)[: p.numel()]
            assert bool((error <= 0.0071 * scale).all())


def test_8bit_follows_fp32(path):
    """40 steps, gradients over five orders of magnitude from block to block and two within one: the drift from fp32."""
    torch.manual_seed(3)
    shape, sizes = (20, 512), 10 ** (-5 * torch.rand(20, 1) - 2 * torch.rand(20, 512))
    start, target = torch.randn(shape), torch.randn(shape)
    fp32, ours = start.clone(), start.clone()
    m, v = torch.zeros(shape), torch.zeros(shape)
    states = _coded(shape)
    scalars = (0.01, 0.9, 0.99, 1e-12, 0.0)
    for step in range(1, 41):
        noise = torch.randn(shape)
        adamw_step_([fp32], [sizes * (fp32 - target + noise)], [m], [v], *scalars, step, 1.0)
        _step_8bit([ours], [sizes * (ours - target + noise)], [states], *scalars, step, 1.0)
    drift = float((ours - fp32).norm() / (fp32 - start).norm())
    assert drift < 0.06, drift
    assert float((decode_state(states[0], states[2], True) - m).norm() / m.norm()) < 0.04
    assert float((decode_state(states[1], states[3], False) - v).norm() / v.norm()) < 0.04


def test_8bit_small_values_of_v_stay_positive(path):
    """A v that became 0 would make the next step 1/eps times the momentum."""
    grad = torch.full((300,), 1e-6)
    grad[0], grad[256:] = 1.0, 1e-19  # the second block's v is below what fp32 can divide by
    param, states = torch.zeros(300), _coded((300,))
    _step_8bit([param], [grad], [states], 0.1, 0.0, 0.5, 1e-30, 0.0, 1, 1.0)
    assert bool((states[1] > 0).all())
    before = param.clone()
    _step_8bit([param], [grad], [states], 0.1, 0.0, 0.5, 1e-30, 0.0, 2, 1.0)
    assert float((param - before).abs().max()) <= 0.2


def test_8bit_zero_nan_and_infinite_gradients(path):
    param, states = torch.ones(512), _coded((512,))
    _step_8bit([param], [torch.zeros(512)], [states], *DEFAULTS, 1, 1.0)
    assert_bits(param, torch.full((512,), 1 - 0.03 * 0.1))
    assert bool((states[0] == 127).all()) and not any(bool(t.any()) for t in states[1:])
    grad = torch.ones(512)
    grad[3], grad[300] = float("nan"), float("inf")
    _step_8bit([param], [grad], [states], *DEFAULTS, 2, 1.0)
    assert param.isnan().nonzero().flatten().tolist() == [3, 300]
    assert float(states[2][0]) == pytest.approx(0.2) and bool(states[2][1].isinf())


def test_8bit_strided_parameters_and_bad_input(path):
    base = torch.randn(6, 100)
    view, grad = base[:, ::2], torch.randn(6, 50)
    wanted, states, others = view.clone(), _coded((6, 50)), _coded((6, 50))
    _step_8bit([view], [grad], [states], *DEFAULTS, 1, 1.0)
    _step_8bit([wanted], [grad.t().contiguous().t()], [others], *DEFAULTS, 1, 1.0)
    torch.testing.assert_close(view, wanted)
    adamw_8bit_step_([], [], [], [], [], [], *DEFAULTS, 1, 1.0)
    p = torch.zeros(300)
    with pytest.raises(TypeError, match="exp_avgs: wanted torch.uint8, got torch.float32"):
        _step_8bit([p], [p], [[p, p, *_coded((300,))[2:]]], *DEFAULTS, 1, 1.0)
    with pytest.raises(ValueError, match=r"exp_avg_absmaxes: wanted shape \(2,\), got \(3,\)"):
        _step_8bit([p], [p], [[*_coded((300,))[:2], torch.zeros(3), torch.zeros(2)]], *DEFAULTS, 1, 1.0)
    with pytest.raises(ValueError, match="step: wanted 1 or more"):
        _step_8bit([p], [p], [_coded((300,))], *DEFAULTS, 0, 1.0)
