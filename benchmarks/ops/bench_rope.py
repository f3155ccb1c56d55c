"""Rotary embedding against transformers' eager form, bf16."""

import torch
from _bench import alternate, check, header, line

from inlay.ops.rope import rope_rotate


def _eager(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def main() -> None:
    header("rope")
    for batch, heads, kv_heads, tokens, width in ((4, 9, 3, 256, 64), (1, 32, 8, 1024, 128)):
        q, k = (torch.randn(batch, tokens, h, width).bfloat16().transpose(1, 2) for h in (heads, kv_heads))
        angles = torch.randn(1, tokens, width // 2).repeat(1, 1, 2)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        exact = _eager(q.double(), cos.double(), sin.double())
        check(rope_rotate(q, k, cos, sin, False)[0], _eager(q, cos, sin), exact, "rope_rotate")
        times = alternate(
            {
                "ours": lambda: rope_rotate(q, k, cos, sin, False),
                "transformers eager": lambda: (_eager(q, cos, sin), _eager(k, cos, sin)),
            }
        )
        line(f"[{batch}, {heads}+{kv_heads}, {tokens}, {width}]", times, gigabytes=4 * (q.numel() + k.numel()) / 1e9)


if __name__ == "__main__":
    main()
