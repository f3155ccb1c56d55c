"""The multi-tensor AdamW step against torch.optim.AdamW and a float64 run of it."""

import pytest
import torch
from _compare import assert_as_good

from inlay.ops import adamw_step_

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
