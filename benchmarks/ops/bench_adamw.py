"""One AdamW step over many fp32 tensors against torch.optim.AdamW (foreach and fused)."""

import torch
from _bench import alternate, header, line

from inlay.ops import adamw_step_


def _optimizer(params, grads, **options):
    copies = [p.clone().requires_grad_() for p in params]
    for copy, grad in zip(copies, grads, strict=True):
        copy.grad = grad
    return torch.optim.AdamW(copies, lr=1e-3, **options)


def main() -> None:
    header("adamw")
    for count, shape in ((60, (576, 46)), (30, (2048, 246)), (300, (16, 64))):
        params, grads = ([torch.randn(shape) for _ in range(count)] for _ in range(2))
        ours = [p.clone() for p in params]
        m, v = ([torch.zeros(shape) for _ in range(count)] for _ in range(2))
        plain = _optimizer(params, grads, foreach=False)
        adamw_step_(ours, grads, m, v, 1e-3, 0.9, 0.999, 1e-8, 0.01, 1, 1.0)
        plain.step()
        torch.testing.assert_close(ours, [p.detach() for p in plain.param_groups[0]["params"]])
        foreach, fused = _optimizer(params, grads, foreach=True), _optimizer(params, grads, fused=True)
        times = alternate(
            {
                "ours": lambda: adamw_step_(ours, grads, m, v, 1e-3, 0.9, 0.999, 1e-8, 0.01, 2, 1.0),
                "torch fused": fused.step,
                "torch foreach": foreach.step,
            }
        )
        line(f"{count} x {shape}", times, gigabytes=28 * count * params[0].numel() / 1e9)


if __name__ == "__main__":
    main()
