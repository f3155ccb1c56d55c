"""Four-bit quantize and dequantize at 4096 x 4096 against bitsandbytes (if installed) and a plain copy of the bytes."""

import torch
from _bench import alternate, header, line

from inlay.ops.quantize_blockwise import dequantize_4bit_, quantize_4bit, quantize_absmax

try:
    import bitsandbytes.functional as bnb
except ImportError:
    bnb = None

ROWS = COLUMNS = 4096


def check_bytes(w: torch.Tensor, quant_type: str) -> None:
    """Correctness first: the library's bytes and values."""
    packed, absmax = quantize_4bit(w, quant_type, 64)
    theirs, state = bnb.quantize_4bit(w, quant_type=quant_type)
    out = torch.empty_like(w)
    dequantize_4bit_(out, packed, absmax, None, None, quant_type, 64, w.shape[1], 0, 0)
    same = torch.equal(packed, theirs.view(-1)) and torch.equal(absmax, state.absmax)
    if not (same and torch.equal(out, bnb.dequantize_4bit(theirs, state))):
        raise SystemExit(f"{quant_type}: not bitsandbytes' bytes; not timing wrong results")


def main() -> None:
    header("quantize_blockwise")
    w = torch.randn(ROWS, COLUMNS).bfloat16()
    size = w.numel()
    packed_bytes = size * (0.5 + 4 / 64)
    for quant_type in ("nf4", "fp4"):
        packed, absmax = quantize_4bit(w, quant_type, 64)
        codes, absmax2, offset = quantize_absmax(absmax)
        out = torch.empty_like(w)
        quantize = {"ours": lambda: quantize_4bit(w, quant_type, 64)}
        flat = {"ours": lambda: dequantize_4bit_(out, packed, absmax, None, None, quant_type, 64, COLUMNS, 0, 0)}
        nested = {"ours": lambda: dequantize_4bit_(out, packed, absmax2, codes, offset, quant_type, 64, COLUMNS, 0, 0)}
        # As many bytes as dequantizing moves: half the bytes are read and written at once by a copy.
        moved = torch.empty(int(packed_bytes + 2 * size) // 2, dtype=torch.uint8)
        target = torch.empty_like(moved)
        flat["copy of as many bytes"] = lambda: target.copy_(moved)
        if bnb is not None:
            check_bytes(w, quant_type)
            theirs, state = bnb.quantize_4bit(w, quant_type=quant_type)
            twice, nested_state = bnb.quantize_4bit(w, quant_type=quant_type, compress_statistics=True)
            quantize["bitsandbytes"] = lambda: bnb.quantize_4bit(w, quant_type=quant_type)
            flat["bitsandbytes"] = lambda: bnb.dequantize_4bit(theirs, state)
            nested["bitsandbytes"] = lambda: bnb.dequantize_4bit(twice, nested_state)
        gigabytes = (packed_bytes + 2 * size) / 1e9
        line(f"quantize {quant_type} [{ROWS}, {COLUMNS}] bf16", alternate(quantize), gigabytes=gigabytes)
        line(f"dequantize {quant_type} [{ROWS}, {COLUMNS}] bf16", alternate(flat), gigabytes=gigabytes)
        line("  double-quantized", alternate(nested), gigabytes=gigabytes)


if __name__ == "__main__":
    main()
