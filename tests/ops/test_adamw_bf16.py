"""The AdamW step on bf16 parameters: with residuals the fp32 step bit for bit, at random right in the mean."""

import math

import pytest
import torch
from _compare import assert_bits, strided

from inlay.ops import adamw_8bit_bf16_step_, adamw_8bit_step_, adamw_bf16_step_, adamw_step_
from inlay.ops._registry import RAW_OPS
from inlay.ops.adamw import STATE_BLOCK
from inlay.ops.adamw_bf16 import join_residual, philox, random_bits, round_at_random, split_master

SHAPES = [(1,), (7, 3), (113,), (0, 5), (203, 41), (), (9000,)]
DEFAULTS = (0.03, 0.8, 0.95, 1e-6, 0.1)  # lr, betas, eps, weight decay
SIGN = (0.0, 0.0, 0.0, 0.0)  # betas, eps and weight decay with which a step is lr·sign(grad)
STATES = pytest.mark.parametrize("states", ["fp32", "8bit"])


def _bits(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def _make(shapes, states):
    """Zeroed states, list by list."""
    if states == "fp32":
        return [[torch.zeros(shape) for shape in shapes] for _ in range(2)]
    codes = [[torch.full(shape, 127 if signed else 0, dtype=torch.uint8) for shape in shapes] for signed in (1, 0)]
    blocks = [-(-torch.Size(shape).numel() // STATE_BLOCK) for shape in shapes]
    return [*codes, *([torch.zeros(n) for n in blocks] for _ in range(2))]


OPS = {"fp32": (adamw_step_, adamw_bf16_step_), "8bit": (adamw_8bit_step_, adamw_8bit_bf16_step_)}


def _apart(shapes):
    return [i << 40 for i in range(len(shapes))]


# --- residuals --------------------------------------------------------------------------------------------------------


@STATES
@pytest.mark.parametrize("gradients", [torch.bfloat16, torch.float32])
def test_residuals_keep_the_fp32_trajectory(path, gradients, states):
    """50 steps of the same op on fp32 parameters that start at the same values: equal bits, states as well."""
    plain, ours = OPS[states]
    params = [torch.randn(shape).bfloat16() for shape in SHAPES]
    masters = [p.float() for p in params]
    residuals = [torch.zeros(shape, dtype=torch.int16) for shape in SHAPES]
    beside, wanted = _make(SHAPES, states), _make(SHAPES, states)
    for step in range(1, 51):
        grads = [torch.randn(shape).to(gradients) for shape in SHAPES]
        plain(masters, [g.float() for g in grads], *wanted, *DEFAULTS, step, 0.5)
        ours(params, grads, *beside, residuals, [], *DEFAULTS, step, 0.5, 0)
    for p, r, master in zip(params, residuals, masters, strict=True):
        assert_bits(join_residual(p, r), master, "master")
        tie = (_bits(master) & 0xFFFF) == 0x8000
        assert_bits(p[~tie], master.bfloat16()[~tie], "nearest")
    for got, want in zip(beside, wanted, strict=True):
        for a, b in zip(got, want, strict=True):
            assert_bits(a, b, "state")


def test_no_fp32_number_is_lost(path):
    """A step of size 0 joins and splits: every bf16, with residuals at both ends, in the middle and anywhere."""
    every = torch.arange(1 << 16).sub(1 << 15).to(torch.int16).view(torch.bfloat16)
    ends = [torch.full((1 << 16,), end, dtype=torch.int16) for end in (-32768, -32767, -1, 0, 1, 32767)]
    anywhere = [torch.randint(-32768, 32768, (1 << 16,)).to(torch.int16) for _ in range(2)]
    for residual in ends + anywhere:
        master = join_residual(every, residual)
        p, r, zeros = every.clone(), residual.clone(), [torch.zeros(1 << 16) for _ in range(3)]
        adamw_bf16_step_([p], zeros[:1], zeros[1:2], zeros[2:], [r], [], 0.0, 0.9, 0.99, 1e-8, 0.0, 1, 1.0, 0)
        nan = master.isnan()
        assert_bits(_bits(p)[~nan], _bits(every)[~nan], "parameter")
        assert_bits(r[~nan], residual[~nan], "residual")
        assert bool((_bits(p)[nan] == 0x7FC0).all()) and not bool(r[nan].any())
    assert 250 < int(every.isnan().sum()) < 260  # what the two masks above are about


def test_split_is_the_nearest_and_its_ties_go_away_from_zero():
    master = torch.cat((torch.randn(100_000), torch.randn(10_000) * 1e-40, torch.randn(1000) * 1e38))
    tie = (_bits(master) & 0xFFFF) == 0x8000
    p, _ = split_master(master)
    assert_bits(p[~tie], master.bfloat16()[~tie])
    bits = (torch.arange(1 << 15).int() << 16) + 0x8000
    ties = bits.view(torch.float32)[:0x7F80]
    for sign in (1.0, -1.0):
        p, r = split_master(sign * ties)
        assert bool((p.float().abs() > ties).all()) and bool((r == -32768).all())
        assert_bits(join_residual(p, r), sign * ties)


# --- at random --------------------------------------------------------------------------------------------------------


def _signed(number):
    return number - (1 << 64) if number >= 1 << 63 else number


@pytest.mark.parametrize(
    "counter, key, wanted",  # philox4x32 with 7 rounds of kat_vectors, in the authors' Random123
    [
        (4 * "00000000 ", 2 * "00000000 ", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (4 * "ffffffff ", 2 * "ffffffff ", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
)
def test_philox_known_answers(counter, key, wanted):
    words = [int(word, 16) for word in f"{counter} {key}".split()]
    low, high, key = (_signed(words[i] | words[i + 1] << 32) for i in (0, 2, 4))
    got = philox(torch.tensor([low]), high, key)
    assert [int(word) for word in got] == [int(word, 16) for word in wanted.split()]


@STATES
@pytest.mark.parametrize("seed, first", [(0, 0), (-1, 8), ((1 << 63) - 1, (1 << 62) - 16), (1 << 40, 1 << 35)])
def test_rounds_as_the_reference_does(path, states, seed, first):
    """Every path gives the bits that plain torch gives for the same fp32 results."""
    plain, ours = OPS[states]
    params = [torch.randn(shape).bfloat16() for shape in SHAPES]
    beside, wanted = _make(SHAPES, states), _make(SHAPES, states)
    each = 9 if states == "fp32" else 16  # of fp32 states some begin in the middle of a call of Philox
    positions = [first + each * i for i in range(len(SHAPES))]
    for step in (1, 2, (1 << 33) + 1):
        grads = [torch.randn(shape) for shape in SHAPES]
        masters = [p.float() for p in params]
        plain(masters, grads, *wanted, *DEFAULTS, step, 0.5)
        ours(params, grads, *beside, [], positions, *DEFAULTS, step, 0.5, seed)
        for p, master, position in zip(params, masters, positions, strict=True):
            assert_bits(p, round_at_random(master, position, step, seed))


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_unbiased(path, fraction, sign):
    """A million roundings: how many go up, in all and by place in a call, and whether neighbours agree too often."""
    count, spacing = 1_000_000, 2.0**-7  # between 1 and 2
    param, zeros = torch.full((count,), sign).bfloat16(), [torch.zeros(count) for _ in range(2)]
    grad = torch.full((count,), -sign)
    adamw_bf16_step_([param], [grad], *([z] for z in zeros), [], [0], fraction * spacing, *SIGN, 1, 1.0, 11)
    up = (param.float().abs() - 1) / spacing
    assert bool(((up == 0) | (up == 1)).all()) and bool((param.sign() == sign).all())
    chance = float(((1 + fraction * spacing) - 1) / spacing)
    variance = chance * (1 - chance)
    assert abs(float(up.double().mean()) - chance) < 4 * math.sqrt(variance / count)
    lanes = up.view(-1, 8).double().mean(0) - chance
    assert float(lanes.abs().max()) < 4 * math.sqrt(variance / (count / 8))
    off = up.double() - chance
    for distance in (1, 2, 7, 8, 16, 256):
        together = float((off[:-distance] * off[distance:]).mean())
        assert abs(together) < 4 * variance / math.sqrt(count - distance), distance


def test_small_updates_arrive(path):
    """400 updates of 1e-5 to a parameter of 1.0, where bf16 numbers are 7.8e-3 apart."""
    steps, count, update = 400, 4096, 1e-5
    one = torch.ones(count).bfloat16()
    assert torch.equal((one.float() + update).bfloat16(), one)  # to the nearest it would never move
    param, zeros = one.clone(), [torch.zeros(count) for _ in range(2)]
    for step in range(1, steps + 1):
        adamw_bf16_step_([param], [-one.float()], *([z] for z in zeros), [], [0], update, *SIGN, step, 1.0, 3)
    moved = float(param.double().mean()) - 1
    sigma = math.sqrt(steps * update * 2**-7 / count)
    assert abs(moved - steps * update) < 4 * sigma < 0.3 * steps * update


@STATES
def test_does_not_depend_on_how_tensors_are_cut(path, states):
    """One tensor, or its parts in any order with the places where they begin; one thread or two."""
    _, op = OPS[states]
    whole, grad = torch.randn(40_000).bfloat16(), torch.randn(40_000).bfloat16()
    scalars = (*DEFAULTS, 5, 1.0, 17)
    wanted = whole.clone()
    op([wanted], [grad], *_make([whole.shape], states), [], [800], *scalars)
    cuts = [1, 8, 13, 500, 8192, 31_286] if states == "fp32" else [256, 512, 8192, 31_040]
    starts = [sum(cuts[:i]) for i in range(len(cuts))]
    before = torch.get_num_threads()
    for order, threads in ((range(len(cuts)), 1), (reversed(range(len(cuts))), 2)):
        chosen = list(order)
        parts = [whole.split(cuts)[i].clone() for i in chosen]
        grads, shapes = [grad.split(cuts)[i] for i in chosen], [p.shape for p in parts]
        torch.set_num_threads(threads)
        try:
            op(parts, grads, *_make(shapes, states), [], [800 + starts[i] for i in chosen], *scalars)
        finally:
            torch.set_num_threads(before)
        for i, part in zip(chosen, parts, strict=True):
            assert_bits(part, wanted.split(cuts)[i], f"part {i}")


def test_seed_step_and_position_matter():
    device = torch.device("cpu")
    drawn = [random_bits(p, 4096, t, s, device) for p, t, s in [(0, 1, 0), (0, 2, 0), (0, 1, 1), (1 << 40, 1, 0)]]
    for i, one in enumerate(drawn):
        assert all(int((one == other).sum()) < 5 for other in drawn[:i])  # 4096·2⁻¹⁶ of them by chance
    assert torch.equal(random_bits(3, 100, 1, 0, device), drawn[0][3:103])


def test_nan_infinity_and_the_largest(path):
    """NaN and infinities stay, whatever a NaN's bits; what bf16 holds exactly never changes."""
    values = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0, 1.0, torch.finfo(torch.bfloat16).max, 1e-40])
    nans = torch.tensor([0x7FFF, 0x7F81, -1], dtype=torch.int16).view(torch.bfloat16)
    start = torch.cat((values.bfloat16(), nans)).repeat(100)
    param, zeros = start.clone(), [torch.zeros(1000) for _ in range(3)]
    adamw_bf16_step_([param], zeros[:1], zeros[1:2], zeros[2:], [], [0], 0.0, 0.9, 0.99, 1e-8, 0.0, 1, 1.0, 0)
    assert_bits(param, start)
    assert torch.equal(param.signbit()[3::10], torch.ones(100, dtype=torch.bool))
    assert bool((_bits(param)[start.isnan()] == 0x7FC0).all())
    grad = torch.full((1000,), float("nan"))
    adamw_bf16_step_([param], [grad], zeros[1:2], zeros[2:], [], [0], 0.1, 0.9, 0.99, 1e-8, 0.0, 2, 1.0, 0)
    assert bool((_bits(param) == 0x7FC0).all())


# --- what every op has to stand --------------------------------------------------------------------------------------


@STATES
@pytest.mark.parametrize("residual", [True, False])
def test_strided_parameters(path, residual, states):
    _, op = OPS[states]
    start, grad = torch.randn(6, 300).bfloat16(), torch.randn(6, 300).bfloat16()
    view, wanted = strided(start), start.clone()
    results = []
    for param, g in ((view, grad.t().contiguous().t()), (wanted, grad)):
        residuals = [torch.zeros(6, 300, dtype=torch.int16)] if residual else []
        beside = _make([(6, 300)], states)
        op([param], [g], *beside, residuals, [] if residual else [0], *DEFAULTS, 1, 1.0, 0)
        results.append((join_residual(param, residuals[0]) if residual else param.float(), beside))
    # A strided parameter takes the reference, whose fp32 results may differ in the last bit.
    if residual:
        torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-6)
    else:
        assert int((results[0][0] != results[1][0]).sum()) <= 2, "other random numbers than row by row"
    for got, want in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(got[0].float(), want[0].float(), atol=1.0 if states == "8bit" else 1e-6, rtol=1e-6)
    assert bool(view._base[..., 1::2].isnan().all()), "what lies between was written"


def test_tells_autograd(path):
    param, residual = torch.nn.Parameter(torch.randn(4).bfloat16()), torch.zeros(4, dtype=torch.int16)
    versions = param._version, residual._version
    zeros = [torch.zeros(4) for _ in range(3)]
    adamw_bf16_step_([param], zeros[:1], zeros[1:2], zeros[2:], [residual], [], *DEFAULTS, 1, 1.0, 0)
    assert param._version > versions[0] and residual._version > versions[1]


def test_no_tensors_and_bad_input(path):
    adamw_bf16_step_([], [], [], [], [], [], *DEFAULTS, 1, 1.0, 0)
    adamw_8bit_bf16_step_([], [], [], [], [], [], [], [], *DEFAULTS, 1, 1.0, 0)
    p, f, r = torch.zeros(3).bfloat16(), torch.zeros(3), torch.zeros(3, dtype=torch.int16)
    codes = _make([(3,)], "8bit")
    for kind, match, args in (
        (TypeError, "params: wanted torch.bfloat16, got torch.float32", ([f], [f], [f], [f], [r], [])),
        (TypeError, "grads: wanted torch.bfloat16, got torch.float32", ([p] * 2, [p, f], [f] * 2, [f] * 2, [], [0, 8])),
        (TypeError, "grads: wanted torch.float32, got torch.float16", ([p], [f.half()], [f], [f], [r], [])),
        (TypeError, "exp_avgs: wanted torch.float32, got torch.bfloat16", ([p], [f], [p], [f], [r], [])),
        (TypeError, "residuals: wanted torch.int16, got torch.uint8", ([p], [f], [f], [f], [r.byte()], [])),
        (ValueError, r"residuals: wanted shape \(3,\), got \(2,\)", ([p], [f], [f], [f], [r[:2]], [])),
        (ValueError, "one length", ([p], [f], [], [f], [r], [])),
        (ValueError, "one of the two per parameter.*got 1 residuals, 1 positions", ([p], [f], [f], [f], [r], [0])),
        (ValueError, "one of the two per parameter.*got 0 residuals, 0 positions", ([p], [f], [f], [f], [], [])),
        (ValueError, "positions: wanted multiples of 1 from 0 on, got -1", ([p], [f], [f], [f], [], [-1])),
    ):
        with pytest.raises(kind, match=match):
            adamw_bf16_step_(*args, *DEFAULTS, 1, 1.0, 0)
    with pytest.raises(ValueError, match="step: wanted 1 or more"):
        adamw_bf16_step_([p], [f], [f], [f], [r], [], *DEFAULTS, 0, 1.0, 0)
    with pytest.raises(ValueError, match="positions: wanted multiples of 8 from 0 on, got 4; begin"):
        adamw_8bit_bf16_step_([p], [f], *codes, [], [4], *DEFAULTS, 1, 1.0, 0)
    with pytest.raises(TypeError, match="exp_avgs: wanted torch.uint8"):
        adamw_8bit_bf16_step_([p], [f], [f], *codes[1:], [], [0], *DEFAULTS, 1, 1.0, 0)


@STATES
@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(path, residual, states):
    shapes = [(300,), (2, 2)]
    params, grads = ([torch.rand(shape).bfloat16() for shape in shapes] for _ in range(2))
    residuals = [torch.zeros(shape, dtype=torch.int16) for shape in shapes] if residual else []
    args = (params, grads, *_make(shapes, states), residuals, [] if residual else _apart(shapes))
    name = "adamw_bf16_step_" if states == "fp32" else "adamw_8bit_bf16_step_"
    torch.library.opcheck(RAW_OPS[name].overload, (*args, *DEFAULTS, 1, 1.0, 5))
