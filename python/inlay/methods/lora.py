"""LoRA, on dense and quantized bases (QLoRA), with LoftQ initialization.

Sources: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; Dettmers et al., "QLoRA: Efficient
Finetuning of Quantized LLMs", 2023; Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
2023 (``use_rslora``); Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..bases import BaseConfig, QuantizedLinear, Storage, quantize_linears
from ..bases.linear import out_in_view
from ..nn.experts import proven_layout
from ..pieces import Piece
from ..pieces.embedding import EmbeddingLowRank
from ..pieces.experts import ExpertsLowRank
from ..pieces.linear import LowRankDelta
from ..select import generator_of
from ..sites import holds_experts, site_of
from ..targets import embeddings, input_embedding, resolve_stacks, stacks_of
from ..ties import each_once
from .base import Calibration, Method, Plan, check_one_of, register
from .experts import check_options, only_experts
from .loftq import loftq
from .peft_files import options_in

#: Options of PEFT's config that say the same here.
_IN_PEFT = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_parameters")
#: Initializations that leave the base as it is.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def _means_nothing(option: str, value: Any) -> bool:
    """Whether a further option of PEFT's config changes nothing of what is computed."""
    ignored = option in ("fan_in_fan_out", "megatron_config", "megatron_core", "qalora_group_size", "eva_config")
    return (
        ignored or (option == "bias" and value == "none") or (option == "init_lora_weights" and value in _PLAIN_INITS)
    )


@register
@dataclass
class LoRA(Method):
    """Train ``ΔW = s·B·A`` of rank ``r`` on the targeted linears, and on embeddings and experts that are named.

    On an embedding, A is zero and B random at first, and there is no dropout, as in PEFT. A head that is tied to it
    takes part (PEFT's ``ensure_weight_tying=True``).

    Attributes:
        r: rank.
        lora_alpha: ``s = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: dropout on the input of A, in training.
        use_rslora: rank-stabilized scaling.
        init: "default" (A Kaiming-uniform, B zero), or "loftq", which needs a quantized base.
        loftq_iterations: T of LoftQ.
        embeddings: also the table that tokens are looked up in; the same as to name it in ``target_modules``.
        target_parameters: names, or ends of names, of stacks of experts' matrices, such as "experts.gate_up_proj" and
            "experts.down_proj": each expert gets factors of its own, as PEFT's option of this name has it. There is no
            dropout on them.
        experts: which experts of these; None for all.
        target_modules: None means "all-linear", which holds no embedding. A list or pattern may name embeddings too;
            [] leaves the linears alone, where there are target_parameters.
    """

    peft_type: ClassVar[str] = "LORA"
    pieces: ClassVar = (LowRankDelta, EmbeddingLowRank, ExpertsLowRank)

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init: str = "default"
    loftq_iterations: int = 5
    embeddings: bool = False
    target_parameters: Sequence[str] | None = None
    experts: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_one_of("init", self.init, ("default", "loftq"))
        if self.r < 1:
            raise ValueError(f"r: wanted a rank of 1 or more, got {self.r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: wanted a probability in [0, 1), got {self.lora_dropout}")
        if self.loftq_iterations < 1:
            raise ValueError(f"loftq_iterations: wanted 1 or more, got {self.loftq_iterations}")
        check_options(self.target_parameters, self.experts)
        if self.target_parameters and self.lora_dropout:
            raise ValueError(
                f"lora_dropout: wanted 0 with target_parameters, got {self.lora_dropout}: PEFT has no dropout on "
                "experts, and would read the adapter as another one"
            )

    @property
    def scale(self) -> float:
        """What ``B·A`` is multiplied by."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def targets(self, model: nn.Module) -> list[str]:
        stacks = list(resolve_stacks(model, self.target_parameters or (), self.layers_to_transform))
        return stacks if only_experts(self) else [*self._modules(model), *stacks]

    def _modules(self, model: nn.Module) -> list[str]:
        names = self.linears(model, "all-linear", by_name=embeddings(model))
        if not self.embeddings:
            return each_once(model, names)
        table = input_embedding(model)
        if table is None:
            raise ValueError(
                f"embeddings=True: this {type(model).__name__} has no embedding of tokens; name one in target_modules"
            )
        return each_once(model, names if table in names else [table, *names])

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        return Plan({site_of(model, name): partial(self._build, where=name) for name in self.targets(model)})

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> Piece:
        return self._build(module, where=where).load(tensors, where)

    def without_data(self) -> Method:
        return replace(self, init="default")

    @property
    def needs_base(self) -> str:
        return 'init="loftq"' if self.init == "loftq" else ""

    def quantize(self, model: nn.Module, config: BaseConfig, pieces: Mapping[str, Any]) -> None:
        def make(module: nn.Module, storage: Storage, name: str) -> QuantizedLinear:
            quantized = QuantizedLinear.of(module, storage, name)
            delta = pieces.get(name)
            if self.init == "loftq" and isinstance(delta, LowRankDelta):
                loftq(out_in_view(module), quantized, delta, self.loftq_iterations, name)
            return quantized

        quantize_linears(model, config, make)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], where: Path) -> LoRA:
        return cls(**options_in(config, _IN_PEFT, where, _means_nothing))

    def peft_fields(self, pieces: Mapping[str, Any]) -> dict[str, Any]:
        ours = ("init", "loftq_iterations", "seed", "embeddings", "experts", "target_parameters")
        fields = {key: value for key, value in self.to_dict().items() if key not in ours}
        modules = sorted(name for name, piece in pieces.items() if not isinstance(piece, ExpertsLowRank))
        return {**fields, "target_modules": modules, "exclude_modules": None, "layers_to_transform": None}

    @classmethod
    def combine(
        cls, methods: Sequence[Method], weights: Sequence[float], parts: Sequence[Mapping[str, Any]]
    ) -> tuple[Method, dict[str, Any]]:
        _, deltas = super().combine(methods, weights, parts)
        first: Any = methods[0]
        r = max(delta.rank for delta in deltas.values())
        for delta in deltas.values():
            delta.pad(r)
        return replace(first, r=r, lora_alpha=r, use_rslora=False, init="default"), deltas

    def _build(self, module: nn.Module, *, where: str) -> Piece:
        generator = generator_of(self.seed, where)
        if holds_experts(module):
            names = stacks_of(module, where, self.target_parameters or ())
            layout = proven_layout(module, where)
            return ExpertsLowRank(module, layout, names, self.r, self.scale, self.experts, generator)
        if isinstance(module, nn.Embedding):
            return EmbeddingLowRank(module, self.r, self.scale, generator, where)
        return LowRankDelta(out_in_view(module), self.r, self.scale, self.lora_dropout, generator)
