"""LoFiT: find the attention heads that matter for a task, and train an offset of each one's output.

Source: Yin, Ye, Durrett, "LoFiT: Localized Fine-tuning on LLM Representations", NeurIPS 2024, arXiv:2406.01563, and the
authors' code: first gates of all heads under an L1 penalty, then, on a fresh model without gates, offsets of the heads
with the largest ``‖A_h‖₂``. They start from normal values of 1e-3; here from 0, so that tuning alone changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn.holder import Holder
from ..pieces.linear.base import LinearPiece, like_of
from ..pieces.linear.head_vectors import HeadGate, HeadOffset
from ..roles import widths
from ..schedules import Schedule
from ..schedules.l1 import L1Penalty
from ..select import expand_groups, gate_gradients, generator_of
from ..sites import LinearSite
from .base import Calibration, Method, Plan, check_one_of, register
from .heads import head_dim_of


@register
@dataclass
class LoFiT(Method):
    """Train an offset of the output of some attention heads, or in a first stage gates of all of them.

    ```python
    gates = inlay.tune(model, inlay.LoFiT(stage="gates"))          # train, at the authors' learning rate of 5e-3
    heads = inlay.LoFiT.top_heads(gates, 0.03)                     # 3% of all heads, as in the paper
    model = inlay.tune(fresh_model, inlay.LoFiT(heads=heads))      # train, at 1e-2
    ```

    Attributes:
        heads: whose offset to train: ``{attention output: head numbers}`` as :meth:`top_heads` makes it; or a number of
            heads or fraction of all, chosen by ``strategy``.
        stage: "offsets" or "gates".
        strategy: "gradient" takes the heads whose gates have the largest gradient on calibration data, in place of the
            first stage (ours); "random" draws them by ``seed``.
        l1_lambda: weight of the gates' L1 penalty, once per optimizer step.
        target_modules: None means the attention outputs.
    """

    peft_type: ClassVar[str] = "LOFIT"
    pieces: ClassVar = (HeadOffset, HeadGate)

    heads: float | int | Mapping[str, Sequence[int]] = 0.1
    stage: str = "offsets"
    strategy: str = "gradient"
    l1_lambda: float = 5e-4

    def __post_init__(self) -> None:
        check_one_of("stage", self.stage, ("offsets", "gates"))
        check_one_of("strategy", self.strategy, ("gradient", "random"))
        if not isinstance(self.heads, Mapping):
            check_count(self.heads)
        elif self.stage == "gates" or not any(self.heads.values()):
            raise ValueError(
                f'heads: wanted some heads, and of stage="offsets", got {dict(self.heads)}, {self.stage!r}'
            )
        if self.l1_lambda < 0:
            raise ValueError(f"l1_lambda: wanted a weight of 0 or more, got {self.l1_lambda}")

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        names = self.linears(model, defaults=("o_proj",))
        width = {name: head_width(model, name) for name in names}
        if self.stage == "gates":
            return Plan({LinearSite(name): self._gate for name in names})
        chosen = self._chosen(model, width, calibration)
        plan = Plan()
        for name, heads in chosen.items():
            channels = expand_groups(torch.tensor(sorted(heads), dtype=torch.int64), width[name])
            plan.pieces[LinearSite(name)] = partial(self._offset, channels=channels, where=name)
        return plan

    def _chosen(
        self, model: nn.Module, width: Mapping[str, int], calibration: Calibration | None
    ) -> dict[str, list[int]]:
        counts = {name: widths(model.get_submodule(name))[0] // width[name] for name in width}
        if isinstance(self.heads, Mapping):
            return _checked(self.heads, counts)
        if self.strategy == "random":
            generator = generator_of(self.seed, "heads")
            scores = {name: torch.rand(count, generator=generator) for name, count in counts.items()}
        else:
            gradients = gate_gradients(model, list(width), calibration or ())
            scores = {name: _norms(gradients[name], width[name]) for name in width}
        return largest(scores, self.heads)

    def schedule(self, model: nn.Module) -> Schedule | None:
        return L1Penalty(self.l1_lambda, "lofit_gate") if self.stage == "gates" and self.l1_lambda else None

    def without_data(self) -> Method:
        return replace(self, strategy="random")

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> LinearPiece:
        if self.stage == "gates":
            return self._gate(module).load(tensors, where)
        if "lofit_channels" not in tensors:
            raise ValueError(f"{where}: wanted lofit_channels, got {sorted(tensors)}; the file is incomplete")
        return self._offset(module, channels=tensors["lofit_channels"], where=where).load(tensors, where)

    @staticmethod
    def top_heads(model: nn.Module, heads: float | int = 0.1, adapter_name: str = "default") -> dict[str, list[int]]:
        """The heads with the largest ``‖A_h‖₂`` of a model whose gates were trained, for ``LoFiT(heads=...)``.

        Args:
            heads: how many of all, or which fraction, rounded down and at least one.

        Raises:
            ValueError: the adapter has no gates, or there are not so many heads.
        """
        check_count(heads)
        held = {n: m.pieces().get(adapter_name) for n, m in model.named_modules() if isinstance(m, Holder)}
        gates = {name: piece for name, piece in held.items() if isinstance(piece, HeadGate)}
        if not gates:
            raise ValueError(f'adapter {adapter_name!r} has no gates: wanted a model tuned by LoFiT(stage="gates")')
        return largest({n: _norms(g.lofit_gate.detach(), head_width(model, n)) for n, g in gates.items()}, heads)

    def _gate(self, module: nn.Module) -> HeadGate:
        return HeadGate(*widths(module), like_of(module))

    def _offset(self, module: nn.Module, *, channels: Tensor, where: str) -> HeadOffset:
        return HeadOffset(*widths(module), like_of(module), channels, where)


def head_width(model: nn.Module, name: str) -> int:
    """Channels of each head in the input of the attention output ``name``; ValueError if there are no heads."""
    width = head_dim_of(model, name, "o_proj", widths(model.get_submodule(name))[0])
    if width is None:
        raise ValueError(f"{name} is no attention output with heads: add it to exclude_modules, or name target_modules")
    return width


def check_count(heads: Any) -> None:
    """ValueError unless ``heads`` is a number of heads, or a fraction in (0, 1]."""
    if not (0 < heads <= 1 if isinstance(heads, float) else isinstance(heads, int) and heads >= 1):
        raise ValueError(f"heads: wanted a number of heads, 1 or more, or a fraction in (0, 1], got {heads!r}")


def largest(scores: Mapping[str, Tensor], heads: float | int) -> dict[str, list[int]]:
    """The ``heads`` (or that fraction) with the largest of all ``scores [heads of a linear]``, ties to the first."""
    flat = torch.cat([score.float().cpu() for score in scores.values()])
    count = max(1, int(heads * flat.numel())) if isinstance(heads, float) else heads
    if count > flat.numel():
        raise ValueError(f"heads: wanted 1 to {flat.numel()} heads, which is all there are, got {count}")
    if not flat.isfinite().all():
        raise ValueError("scores of heads hold NaN or infinity; check weights and calibration")
    best = set(torch.sort(flat, descending=True, stable=True).indices[:count].tolist())
    found: dict[str, list[int]] = {}
    start = 0
    for name, score in scores.items():
        kept = [head for head in range(score.numel()) if start + head in best]
        found |= {name: kept} if kept else {}
        start += score.numel()
    return found


def _norms(values: Tensor, width: int) -> Tensor:
    return torch.linalg.vector_norm(values.reshape(-1, width).float(), dim=1)


def _checked(heads: Mapping[str, Sequence[int]], counts: Mapping[str, int]) -> dict[str, list[int]]:
    for name, numbers in heads.items():
        if name not in counts:
            raise ValueError(f"heads: {name!r} is no attention output to tune; there are {sorted(counts)}")
        if len(set(numbers)) != len(numbers) or not all(0 <= number < counts[name] for number in numbers):
            raise ValueError(
                f"heads: wanted distinct heads of {name} from 0 to {counts[name] - 1}, got {list(numbers)}"
            )
    return {name: list(numbers) for name, numbers in heads.items() if numbers}
