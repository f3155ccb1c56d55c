"""SSF: every output is scaled and shifted.

Source: Lian, Zhou, Feng, Wang, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", NeurIPS
2022, arXiv:2210.08823: after each linear and norm (ours: not after a patch embedding's convolution). The authors draw
the start around the identity; here it is the identity itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..pieces import Piece
from ..pieces.scale_shift import Scale, ScaleShift, norm_offset
from ..sites import is_norm, site_of
from .base import Calibration, Method, Plan, check_one_of, register


@register
@dataclass
class SSF(Method):
    """Train a scale, and where it can be merged a shift, of every linear's and norm's output; no input is kept.

    Attributes:
        shift: "mergeable" shifts where the module has a bias to merge it into; True everywhere, as in the paper: a
            model without biases cannot be merged then; False nowhere.
        target_modules: None means all linears but the head, and all norms; entries name linears or norms.
    """

    peft_type: ClassVar[str] = "SSF"
    pieces: ClassVar = (ScaleShift, Scale)

    shift: bool | str = "mergeable"

    def __post_init__(self) -> None:
        if not isinstance(self.shift, bool):
            check_one_of("shift", self.shift, ("mergeable",))

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        norms = [name for name, module in model.named_modules() if name and is_norm(module)]
        good = {name for name in norms if norm_offset(model.get_submodule(name)) is not None}
        names = self.linears(model, "all-linear", also=norms)
        other = [name for name in names if name in norms and name not in good]
        if other:
            kinds = sorted({type(model.get_submodule(name)).__name__ for name in other})
            warnings.warn(
                f"SSF: {len(other)} norms ({', '.join(kinds)}, first {other[0]}) take more than one input or are not "
                "linear in their weight; they get no scale",
                stacklevel=4,
            )
        return Plan({site_of(model, name): self._build for name in names if name not in other})

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> Piece:
        return self._build(module).load(tensors, where)

    def _build(self, module: nn.Module) -> Scale:
        mergeable = getattr(module, "bias", None) is not None
        return ScaleShift(module) if self.shift is True or (self.shift and mergeable) else Scale(module)
