"""One AdamW step over many tensors: fp32 with fp32 and 8-bit states, against torch.optim.AdamW (foreach and fused), and
bf16 with a residual and at random, against torch's with bf16 states."""

import torch
from _bench import alternate, header, line

from inlay.ops import adamw_8bit_step_, adamw_bf16_step_, adamw_step_
from inlay.ops.adamw import STATE_BLOCK
from inlay.ops.adamw_bf16 import join_residual

SCALARS = (1e-3, 0.9, 0.999, 1e-8, 0.01)  # lr, betas, eps, weight decay


def _optimizer(params, grads, **options):
    copies = [p.clone().requires_grad_() for p in params]
    for copy, grad in zip(copies, grads, strict=True):
        copy.grad = grad
    return torch.optim.AdamW(copies, lr=1e-3, **options)


def _states_8bit(params):
    codes = [[torch.zeros(p.shape, dtype=torch.uint8) for p in params] for _ in range(2)]
    return *codes, *([torch.zeros(-(-p.numel() // STATE_BLOCK)) for p in params] for _ in range(2))


def _check_8bit(params, grads, wanted):
    """The first step loses nothing; the states it leaves are what is approximate."""
    ours = [p.clone() for p in params]
    adamw_8bit_step_(ours, grads, *_states_8bit(params), *SCALARS, 1, 1.0)
    torch.testing.assert_close(ours, wanted)


def _bf16_case(count, shape):
    params, grads = ([torch.randn(shape).bfloat16() for _ in range(count)] for _ in range(2))
    masters, ours, random = [p.float() for p in params], [p.clone() for p in params], [p.clone() for p in params]
    residuals = [torch.zeros(shape, dtype=torch.int16) for _ in range(count)]
    m, v = ([torch.zeros(shape) for _ in range(count)] for _ in range(2))
    positions = [i << 40 for i in range(count)]
    adamw_bf16_step_(ours, grads, m, v, residuals, [], *SCALARS, 1, 1.0, 0)
    adamw_step_(masters, [g.float() for g in grads], *([torch.zeros(shape) for _ in m] for _ in "mv"), *SCALARS, 1, 1.0)
    for p, residual, master in zip(ours, residuals, masters, strict=True):
        assert torch.equal(join_residual(p, residual), master)
    foreach, fused = _optimizer(params, grads, foreach=True), _optimizer(params, grads, fused=True)
    times = alternate(
        {
            "ours": lambda: adamw_bf16_step_(ours, grads, m, v, residuals, [], *SCALARS, 2, 1.0, 0),
            "at random": lambda: adamw_bf16_step_(random, grads, m, v, [], positions, *SCALARS, 2, 1.0, 0),
            "torch fused, bf16 states": fused.step,
            "torch foreach, bf16 states": foreach.step,
        }
    )
    line(f"bf16, residual: {count} x {shape}", times, gigabytes=26 * count * params[0].numel() / 1e9)


def main() -> None:
    header("adamw")
    for count, shape in ((60, (576, 46)), (30, (2048, 246)), (300, (16, 64))):
        params, grads = ([torch.randn(shape) for _ in range(count)] for _ in range(2))
        ours, coded = ([p.clone() for p in params] for _ in range(2))
        m, v = ([torch.zeros(shape) for _ in range(count)] for _ in range(2))
        states = _states_8bit(params)
        plain = _optimizer(params, grads, foreach=False)
        adamw_step_(ours, grads, m, v, *SCALARS, 1, 1.0)
        plain.step()
        torch.testing.assert_close(ours, [p.detach() for p in plain.param_groups[0]["params"]])
        _check_8bit(params, grads, ours)
        foreach, fused = _optimizer(params, grads, foreach=True), _optimizer(params, grads, fused=True)
        times = alternate(
            {
                "ours": lambda: adamw_step_(ours, grads, m, v, *SCALARS, 2, 1.0),
                "8-bit states": lambda: adamw_8bit_step_(coded, grads, *states, *SCALARS, 2, 1.0),
                "torch fused": fused.step,
                "torch foreach": foreach.step,
            }
        )
        line(f"{count} x {shape}", times, gigabytes=28 * count * params[0].numel() / 1e9)
        _bf16_case(count, shape)


if __name__ == "__main__":
    main()
