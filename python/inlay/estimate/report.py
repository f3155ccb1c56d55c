"""What an estimate says, and the table it prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MIB = 2**20
LOSS, WORKING, GRADIENTS = "loss", "working", "gradients"  # kinds that no module names


@dataclass
class Estimate:
    """Memory and work of one training step, from counted tensors; sizes in bytes.

    Attributes:
        setting: what was estimated: model, method, base, batch, seq, dtype, optimizer, device.
        weights: the frozen model, with its packed base. trainable: the adapter's parameters.
        optimizer_state, gradients: of the trainable parameters.
        kept: what is kept for backward when it begins, by kind.
        at_peak: everything but weights, parameters and optimizer state when their sum is highest, by kind.
        runtime: what allocator and libraries take besides tensors: at least, as expected, and at most.
        flops: floating-point operations of a step by part; a multiply and an add count as two.
        adapter: bytes of ``adapter_model.safetensors``. tokens: in the batch.
        units: bytes of frozen weights in "blocks" and in the "rest", and of the "largest" block, adapter included.
    """

    setting: dict[str, Any]
    weights: int
    trainable: int
    optimizer_state: int
    gradients: int
    kept: dict[str, int]
    at_peak: dict[str, int]
    runtime: tuple[int, ...]
    flops: dict[str, float]
    adapter: int
    tokens: int
    units: dict[str, int] = field(default_factory=dict)

    @property
    def kept_bytes(self) -> int:
        """Kept for backward, each storage once."""
        return sum(self.kept.values())

    @property
    def counted(self) -> int:
        """Counted tensor bytes above the loaded model at the highest point of a step."""
        return self.trainable + self.optimizer_state + sum(self.at_peak.values())

    @property
    def low(self) -> int:
        """Peak above the loaded model if allocator and libraries take the least they were seen to."""
        return self.counted + self.runtime[0]

    @property
    def peak(self) -> int:
        """Expected peak above the loaded model: adapter, optimizer state, activations, gradients, workspace."""
        return self.counted + self.runtime[1]

    @property
    def high(self) -> int:
        """Peak above the loaded model if allocator and libraries take the most they were seen to."""
        return self.counted + self.runtime[2]

    @property
    def total(self) -> int:
        """Expected peak with the model itself."""
        return self.weights + self.peak

    @property
    def step_flops(self) -> float:
        """Floating-point operations of one step."""
        return sum(self.flops.values())

    def to_dict(self) -> dict[str, Any]:
        """Every number, JSON-able."""
        names = ("setting", "weights", "trainable", "optimizer_state", "gradients", "kept", "at_peak", "flops")
        values = {name: getattr(self, name) for name in (*names, "adapter", "tokens")}
        return {**values, "counted": self.counted, "low": self.low, "peak": self.peak, "high": self.high}

    def __str__(self) -> str:
        head = ", ".join(f"{key} {value}" for key, value in self.setting.items() if value not in (None, False))
        lines = [head, "", "memory, MiB"]
        lines += _rows({"frozen weights": self.weights})
        above = {"adapter parameters": self.trainable, "optimizer state": self.optimizer_state}
        above |= {_TITLES.get(kind, f"kept: {kind}"): size for kind, size in _by_size(self.at_peak)}
        above |= {"allocator and libraries": self.runtime[1]}
        lines += _rows(above)
        lines.append(f"  {'peak above the model':28}{self.peak / MIB:12,.1f}   ({self._range()})")
        lines.append(f"  {'peak':28}{self.total / MIB:12,.1f}")
        lines.append(f"  {'kept for backward':28}{self.kept_bytes / MIB:12,.1f}   {self._per_token()}")
        lines += ["", "work of one step, GFLOP"]
        lines += [f"  {part:28}{count / 1e9:12,.1f}" for part, count in _by_size(self.flops)]
        lines.append(f"  {'sum':28}{self.step_flops / 1e9:12,.1f}")
        lines += ["", f"adapter on disk {self.adapter / MIB:,.1f} MiB"]
        return "\n".join(lines)

    def _range(self) -> str:
        return f"{self.low / MIB:,.0f} to {self.high / MIB:,.0f}"

    def _per_token(self) -> str:
        return f"{self.kept_bytes / max(self.tokens, 1) / 1000:,.1f} KB a token"


_TITLES = {WORKING: "tensors in use", GRADIENTS: "gradients", LOSS: "loss workspace"}


def _by_size(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(((key, value) for key, value in values.items() if value), key=lambda item: -item[1])


def _rows(values: Mapping[str, int]) -> list[str]:
    return [f"  {name:28}{size / MIB:12,.1f}" for name, size in values.items() if size]
