"""S²FT: train a few attention heads and FFN channels of each block as dense submatrices.

Source: Xinyu Yang et al., "S²FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
NeurIPS 2024.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..bases.linear import out_in_view
from ..nn.experts import proven_layout
from ..pieces import Piece
from ..pieces.embedding import EmbeddingRows
from ..pieces.experts import ExpertsChannels
from ..pieces.linear import Delta, ExactSubmatrixDelta, InPlaceSubmatrixDelta, SubmatrixDelta
from ..pieces.linear.submatrix import Side
from ..roles import ROLES, role_by_name, roles, widths
from ..select import activation_scores, expand_groups, gradient_scores, pick_groups, random_groups, weight_scores
from ..sites import holds_experts, site_of
from ..targets import INPUT_SIDE_ROLES, embeddings, resolve_stacks, stacks_of, suffix_match
from ..ties import each_once
from .base import Calibration, Method, Plan, check_one_of, register
from .experts import channels_of_experts, check_options, only_experts
from .heads import head_dim_of

STRATEGIES = ("random", "weight", "activation", "product", "gradient")


@register
@dataclass
class S2FT(Method):
    """Train chosen input or output channels of the targeted linears; everything else stays frozen.

    Attributes:
        ratio: fraction of channels to train, in (0, 1]; or a dict ``{target suffix: fraction}``.
        channels: exact number of channels per linear instead of ``ratio``; int or ``{target suffix: int}``.
        target_modules: None means ``("o_proj", "down_proj")`` by the family's own names, the paper's best split. Of an
            embedding, which has to be named, rows train (and those of a head that is tied to it).
        side: ``"in"`` trains input channels ``ΔW[:, I]``, ``"out"`` output channels ``ΔW[O, :]``, ``"auto"`` takes
            "in" for o_proj and down_proj and "out" for the rest; or ``{target suffix: side}``.
        granularity: channels are chosen in aligned groups of this many; ``"auto"`` is whole heads (``head_dim``)
            for attention linears and 1 elsewhere; or ``{target suffix: int}``.
        strategy: "random" (default), "weight" (norm of the channel's weights), "activation" (mean size on
            calibration data), "product" (weight times activation) or "gradient" (norm of its weight gradient, summed
            over the calibration batches).
        select: take the "smallest" (the paper finds it slightly better) or the "largest" scores.
        update: "additive" adds a separate fp32 ΔW, on any base; "in_place" is the paper's form, for dense bases.
        target_parameters: names, or ends of names, of the experts' second stack ("experts.down_proj"): inner channels
            of each expert train, as many as ``ratio`` or ``channels`` says, by strategy "random" or "weight". With
            target_modules=[] nothing else does.
        experts: which experts of these; None for all.
        keep: on a quantized base, "additive" trains a ΔW on top of it; "exact" keeps the chosen channels in high
            precision and takes them out of the packed weight, which also removes their quantization error.
    """

    peft_type: ClassVar[str] = "S2FT"
    pieces: ClassVar = (SubmatrixDelta, InPlaceSubmatrixDelta, ExactSubmatrixDelta, EmbeddingRows, ExpertsChannels)

    ratio: float | dict[str, float] = 0.03
    channels: int | dict[str, int] | None = None
    side: str | dict[str, str] = "auto"
    granularity: int | str | dict[str, int] = "auto"
    strategy: str = "random"
    select: str = "smallest"
    update: Literal["additive", "in_place"] = "additive"
    keep: Literal["additive", "exact"] = "additive"
    target_parameters: Sequence[str] | None = None
    experts: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_one_of("strategy", self.strategy, STRATEGIES)
        check_one_of("select", self.select, ("largest", "smallest"))
        check_one_of("update", self.update, ("additive", "in_place"))
        check_one_of("keep", self.keep, ("additive", "exact"))
        check_options(self.target_parameters, self.experts)
        if self.keep == "exact" and self.update == "in_place":
            raise ValueError('wanted update="in_place" (dense bases) or keep="exact" (quantized bases), got both')
        for side in _values(self.side):
            check_one_of("side", side, ("auto", "in", "out"))
        for ratio in _values(self.ratio):
            if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
                raise ValueError(f"ratio: wanted a fraction in (0, 1], got {ratio!r}; 0.03 trains 3% of the channels")
        for channels in _values(self.channels):
            if channels is not None and (not isinstance(channels, int) or channels < 1):
                raise ValueError(f"channels: wanted a whole number of channels, 1 or more, got {channels!r}")

    def plan(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        stacks = resolve_stacks(model, self.target_parameters or (), self.layers_to_transform)
        plan = Plan() if stacks and only_experts(self) else self._plan_modules(model, calibration)
        for path, names in stacks.items():
            plan.pieces[site_of(model, path)] = partial(self._build_experts, names=names, where=path)
        return plan

    def _build_experts(
        self, module: nn.Module, *, names: Sequence[str], where: str, indices: Tensor | None = None
    ) -> ExpertsChannels:
        layout = proven_layout(module, where)
        if indices is None:
            indices = channels_of_experts(self, module, layout, f"{where}.{layout.down}", self.experts)
        return ExpertsChannels(module, layout, names, indices, self.experts)

    def _plan_modules(self, model: nn.Module, calibration: Calibration | None) -> Plan:
        names = self.linears(model, by_name=embeddings(model))
        names = each_once(model, names)
        self._check_embeddings(model, names)
        if self.target_modules is None:
            warn_about_missing_role(model, names)
        chosen, sides = self.choose(model, names, calibration), self.sides(model, names)
        return Plan(
            {
                site_of(model, name): partial(self._build, indices=chosen[name], side=sides[name], where=name)
                for name in names
            }
        )

    def _check_embeddings(self, model: nn.Module, names: Sequence[str]) -> None:
        tables = embeddings(model)
        for name in names:
            if name in tables and (self.strategy not in ("random", "weight") or self.update != "additive"):
                raise ValueError(
                    f'{name}: rows of an embedding are chosen by strategy="random" or "weight" and train by '
                    f'update="additive", got {self.strategy!r} and {self.update!r}; tune it by an adapter of its own'
                )
            if name in tables and (self.keep != "additive" or self._side_of(name, None) == "in"):
                raise ValueError(
                    f'{name}: rows of an embedding train, side="out" (or "auto") with keep="additive", got '
                    f"side={self.side!r} and keep={self.keep!r}"
                )

    def choose(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> dict[str, Tensor]:
        """The channels to train of each named linear, sorted int64."""
        played = roles(model)
        for option in ("ratio", "channels", "side", "granularity"):
            _check_suffixes(option, getattr(self, option), names, played)
        sides = self.sides(model, names)
        scores = self._scores(model, sides, calibration)
        chosen = {}
        for name in names:
            total, role = _channels(model.get_submodule(name), sides[name]), played.get(name)
            size = self._granularity(model, name, role, total)
            count = self.count_of(name, role, total, size)
            if scores is None:
                groups = random_groups(total // size, count, self.seed, name)
            else:
                if not scores[name].isfinite().all():
                    raise ValueError(f"{name}: scores hold NaN or infinity; check weights and calibration")
                groups = pick_groups(scores[name], size, count, self.select)
            chosen[name] = expand_groups(groups, size)
        return chosen

    def without_data(self) -> Method:
        return replace(self, strategy="random")

    def sides(self, model: nn.Module, names: Sequence[str]) -> dict[str, Side]:
        """Whether each named linear trains input or output channels."""
        played = roles(model)
        return {name: self._side_of(name, played.get(name)) for name in names}

    def _side_of(self, name: str, role: str | None) -> Side:
        side = _for_target(self.side, name, role, "side", "auto")
        return side if side != "auto" else ("in" if role in INPUT_SIDE_ROLES else "out")

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> Piece:
        if holds_experts(module):
            if "s2ft_expert_indices" not in tensors:
                raise ValueError(f"{where}: wanted s2ft_expert_indices, got {sorted(tensors)}; the file is incomplete")
            names, held = stacks_of(module, where, self.target_parameters or ()), tensors["s2ft_expert_indices"]
            return self._build_experts(module, names=names, where=where, indices=held).load(tensors, where)
        if "s2ft_indices" not in tensors:
            raise ValueError(f"{where}: wanted s2ft_indices, got {sorted(tensors)}; the file is incomplete")
        indices = tensors["s2ft_indices"]
        if isinstance(module, nn.Embedding):
            return EmbeddingRows(module, indices, where).load(tensors, where)
        side = _side_of_values(module, tensors) or self._side_of(where, role_by_name(where))
        return self._build(module, indices=indices, side=side, where=where).load(tensors, where)

    @classmethod
    def combine(
        cls, methods: Sequence[Method], weights: Sequence[float], parts: Sequence[Mapping[str, Delta]]
    ) -> tuple[Method, dict[str, Delta]]:
        _, deltas = super().combine(methods, weights, parts)
        first: Any = methods[0]
        sides = {name: delta.side for name, delta in deltas.items() if isinstance(delta, SubmatrixDelta)}
        names = sorted(name for name, delta in deltas.items() if not isinstance(delta, ExpertsChannels))
        return replace(first, target_modules=names, side=sides), deltas

    def _build(self, module: nn.Module, *, indices: Tensor, side: Side, where: str) -> Any:
        if isinstance(module, nn.Embedding):
            return EmbeddingRows(module, indices, where)
        if self.keep == "exact":
            delta = ExactSubmatrixDelta
        else:
            delta = InPlaceSubmatrixDelta if self.update == "in_place" else SubmatrixDelta
        return delta(out_in_view(module), indices, side, where)

    def _scores(
        self, model: nn.Module, sides: Mapping[str, str], calibration: Calibration | None
    ) -> dict[str, Tensor] | None:
        if self.strategy == "random":
            return None
        if self.strategy == "gradient":
            return gradient_scores(model, sides, calibration or ())
        activation = activation_scores(model, sides, calibration or ()) if self.strategy != "weight" else {}
        scores = {}
        for name, side in sides.items():
            weight = out_in_view(model.get_submodule(name))
            by_weight = 1.0 if self.strategy == "activation" else weight_scores(weight, side)
            scores[name] = by_weight * activation.get(name, 1.0)
        return scores

    def _granularity(self, model: nn.Module, name: str, role: str | None, total: int) -> int:
        size = _for_target(self.granularity, name, role, "granularity", "auto")
        if size == "auto":
            size = head_dim_of(model, name, role, total) or 1
        if not isinstance(size, int) or size < 1 or total % size:
            raise ValueError(f"{name}: granularity must divide its {total} channels, got {size}")
        return size

    def count_of(self, name: str, role: str | None, total: int, size: int) -> int:
        """How many groups of ``size`` channels to take."""
        if self.channels is None:
            ratio = _for_target(self.ratio, name, role, "ratio", None)
            return max(1, round(ratio * (total // size)))
        channels = _for_target(self.channels, name, role, "channels", None)
        if not 0 < channels <= total or channels % size:
            raise ValueError(f"{name}: channels must be a multiple of {size} in [{size}, {total}], got {channels}")
        return channels // size


def warn_about_missing_role(model: nn.Module, names: Sequence[str]) -> None:
    """Say so where the default targets found only one of the two roles."""
    played = roles(model)
    missing = [role for role in ROLES if not any(played.get(name) == role for name in names)]
    for role in missing:
        what = {"o_proj": "attention output", "down_proj": "FFN down projection"}[role]
        warnings.warn(
            f"S2FT: found no {what} among the linears of this {type(model).__name__}, so only "
            f"{sorted({name.rpartition('.')[2] for name in names})} are tuned; name others in target_modules",
            stacklevel=4,
        )


def _side_of_values(module: nn.Module, tensors: Mapping[str, Tensor]) -> Side | None:
    """The side that stored values were trained on, by their shape; None for every channel of a square weight, where
    both mean the same, and for values of a wrong shape."""
    in_features, out_features = widths(module)
    values, count = tensors.get("s2ft_values"), tensors["s2ft_indices"].numel()
    shape = None if values is None else tuple(values.shape)
    fits: list[Side] = [side for side, like in _VALUE_SHAPES.items() if shape == like(out_features, in_features, count)]
    return fits[0] if len(fits) == 1 else None


_VALUE_SHAPES: dict[Side, Callable[[int, int, int], tuple[int, int]]] = {
    "in": lambda out_features, in_features, count: (out_features, count),
    "out": lambda out_features, in_features, count: (count, in_features),
}


def _check_suffixes(what: str, option: Any, names: list[str], played: Mapping[str, str]) -> None:
    """Raise ValueError if a dict's entry speaks of no tuned linear: it would silently do nothing."""
    for suffix in option if isinstance(option, dict) else ():
        if not any(_speaks_of(suffix, name, played.get(name)) for name in names):
            leaves = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(f"{what}: {suffix!r} is no tuned linear; they end in {leaves}; remove the entry")


def _values(option: Any) -> list[Any]:
    """The values of an option that may be one for all targets or a dict by target."""
    return list(option.values()) if isinstance(option, dict) else [option]


def _speaks_of(suffix: str, name: str, role: str | None) -> bool:
    return suffix_match(name, suffix) or role == suffix


def _for_target(option: Any, name: str, role: str | None, what: str, default: Any) -> Any:
    """``option`` itself, or its entry whose suffix (or role) matches ``name``."""
    if not isinstance(option, dict):
        return option
    for suffix, value in option.items():
        if _speaks_of(suffix, name, role):
            return value
    if default is None:
        raise ValueError(f"{what}={option} says nothing for {name}; add an entry for its suffix")
    return default


def _channels(module: nn.Module, side: str) -> int:
    return out_in_view(module).shape[1 if side == "in" else 0]
