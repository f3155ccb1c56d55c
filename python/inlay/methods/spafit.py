"""SPAFIT: the lowest blocks frozen, biases in the middle, LoRA on attention above.

Source: Arora, Wang, "SPAFIT: Stratified Progressive Adaptation Fine-tuning for Pre-trained Large Language Models",
2024, arXiv:2405.00201: group 1 is frozen, group 2 trains biases, group 3 has LoRA on parts of attention and trains the
biases of everything else. Which parts: query and value (LoRA's own choice) unless ``target_modules`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..bases.linear import is_linear
from ..pieces import Whole
from ..sites import block_of, blocks_of
from .base import Calibration, Plan, register
from .lora import LoRA
from .projections import is_query_or_value
from .whole import in_layers


@register
@dataclass
class SPAFIT(LoRA):
    """LoRA in the upper blocks, biases in the middle ones.

    Attributes:
        strata: where the second and the third group begin, as fractions of the depth.
        r, lora_alpha, ...: of the LoRA; see :class:`inlay.LoRA`.
        target_modules: linears of the third group that get LoRA; None means queries and values.
    """

    peft_type: ClassVar[str] = "SPAFIT"

    strata: Sequence[float] = (1 / 3, 2 / 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.strata = list(self.strata)
        if self.embeddings:
            raise ValueError("embeddings=True: SPAFIT trains nothing below its blocks; use LoRA(embeddings=True)")
        if len(self.strata) != 2 or not 0 <= self.strata[0] <= self.strata[1] < 1:
            raise ValueError(f"strata: wanted two fractions 0 <= a <= b < 1 of the depth, got {self.strata}")

    @property
    def holding(self) -> Whole:
        return Whole()

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        blocks = blocks_of(model)
        second, third = (round(share * len(blocks)) for share in self.strata)
        loras = super().plan(model, calibration).pieces
        pieces = {site: build for site, build in loras.items() if block_of(site.path, blocks[third:])}
        if not pieces:
            raise ValueError(
                f"strata={self.strata}: no target is in the {len(blocks) - third} blocks of the third group"
            )
        tuned = {site.path for site in pieces}
        keys = [key for key, _ in model.named_parameters() if key.endswith(".bias") and ".deltas." not in key]
        keys = [key for key in in_layers(model, keys, self.layers_to_transform) if block_of(key, blocks[second:])]
        return Plan(pieces, {key: self.holding for key in keys if key.rpartition(".")[0] not in tuned})

    def targets(self, model: nn.Module) -> list[str]:
        if self.target_modules is not None:
            return super().targets(model)
        names = [name for name, module in model.named_modules() if is_linear(module) and is_query_or_value(name)]
        return self.linears(model, names or "all-linear")
