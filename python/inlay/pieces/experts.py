"""Changes of the stacks of a mixture's experts, one matrix each.

Source of the files: PEFT's LoRA on parameters (``ParamWrapper``, peft/tuners/lora/layer.py of PEFT 0.21): A is
``[E·r, in]`` with the expert slowest, B ``[out, r·E]`` with the expert fastest. Of several parameters of one module the
last is the outermost wrapper; the others are ``base_layer`` in it, as often as there are wrappers around them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.expert_layout import ExpertsLayout, experts_of
from ..ops.expert_mlp import Channels, LowRank, Term
from .base import Piece


class ExpertsPiece(Piece):
    """A piece on one module of experts: on one of its stacks or both, of all experts or some.

    Args:
        module: the module. layout: what it computes. names: the stacks that it changes.
        experts: which experts; None for all.

    Raises:
        ValueError: an expert that is not there, or twice.
    """

    def __init__(
        self, module: nn.Module, layout: ExpertsLayout, names: Sequence[str], experts: Sequence[int] | None
    ) -> None:
        super().__init__()
        self.names = tuple(name for name in module._parameters if name in names)  # as PEFT nests them
        self.shapes = {name: tuple(layout.stack(module, name).shape) for name in self.names}  # [E, in, out]
        self.transposed, self.count = layout.transposed, experts_of(module)
        #: PEFT takes a stack for [E, out, in] unless its module says that it is not.
        self.swapped = layout.transposed != bool(getattr(module, "is_transposed", False))
        self.experts = None if experts is None else tuple(check_experts(experts, self.count))
        slots = torch.full((self.count,), -1)
        chosen = range(self.count) if self.experts is None else self.experts
        slots[list(chosen)] = torch.arange(len(chosen))
        self.register_buffer("slots", slots.to(module._parameters[layout.up].device), persistent=False)

    @property
    def chosen(self) -> list[int]:
        """The experts that it changes, in order."""
        return list(range(self.count)) if self.experts is None else list(self.experts)

    @abstractmethod
    def terms(self, name: str) -> tuple[Term, ...]:
        """What it adds to the product with the stack ``name``."""

    @abstractmethod
    def change(self, name: str, slot: int) -> Tensor:
        """ΔW ``[out, in]`` of the ``slot``-th chosen expert in the stack ``name``."""

    def merge_stack(self, name: str, stack: Tensor) -> Tensor:
        """A copy of ``stack``, as stored, that holds the change: one rounding. Differentiable as :meth:`merge` is."""
        if name not in self.names:
            return stack
        merged = stack.clone()
        for slot, expert in enumerate(self.chosen):
            change = self.change(name, slot).to(stack.device)
            wide = stack[expert].to(change.dtype) + (change.t() if self.transposed else change)
            merged[expert] = wide.to(stack.dtype)
        return merged

    def after(self, y: Tensor, x: Any) -> Tensor:
        raise NotImplementedError("a piece on experts is part of their products")

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ValueError("a piece on experts is merged stack by stack")

    def check_merge(self, bias: Tensor | None) -> None:
        """It always can be."""

    def structure(self) -> Any:
        return self.names, self.experts

    def copied(self, attributes: Sequence[str]) -> Any:
        """Another piece of the same kind, without its tensors."""
        made: Any = type(self).__new__(type(self))
        nn.Module.__init__(made)
        for name in attributes:
            setattr(made, name, getattr(self, name))
        made.register_buffer("slots", self._buffers["slots"], persistent=False)
        return made

    def extra_repr(self) -> str:
        return f"{', '.join(self.names)}, experts={'all' if self.experts is None else len(self.experts)}"


def check_experts(experts: Sequence[int], count: int) -> list[int]:
    """``experts``, sorted; ValueError where one is not among ``count``, or twice, or there is none."""
    chosen = sorted(int(e) for e in experts)
    if not chosen or len(set(chosen)) < len(chosen) or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"experts: wanted distinct numbers from 0 to {count - 1}, got {list(experts)}")
    return chosen


class ExpertsLowRank(ExpertsPiece):
    """``ΔW[e] = s·B[e]·A[e]``, A fp32 ``[n, r, in]`` Kaiming-uniform, B ``[n, out, r]`` zero.

    Args:
        r: rank. scale: s. generator: where A is drawn from.
    """

    stored = {
        "base_layer.lora_A.weight": "up_A",
        "base_layer.lora_B.weight": "up_B",
        "lora_A.weight": "down_A",
        "lora_B.weight": "down_B",
    }

    def __init__(
        self,
        module: nn.Module,
        layout: ExpertsLayout,
        names: Sequence[str],
        r: int,
        scale: float,
        experts: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(module, layout, names, experts)
        self.scale = scale
        self.parts = {name: "up" if name == layout.up else "down" for name in self.names}
        self.stored = dict(self._files())  # type: ignore[misc]
        held: Any = module._parameters[layout.up]
        like = torch.empty(0, dtype=torch.promote_types(held.dtype, torch.float32), device=held.device)
        for name, part in self.parts.items():
            _, width, out = self.shapes[name]
            bound = 1 / math.sqrt(width)  # Kaiming-uniform with a = sqrt(5), as torch initializes a Linear
            drawn = torch.rand(len(self.chosen), r, width, generator=generator) * (2 * bound) - bound
            setattr(self, f"{part}_A", nn.Parameter(drawn.to(like)))
            setattr(self, f"{part}_B", nn.Parameter(like.new_zeros(len(self.chosen), out, r)))

    def _files(self) -> list[tuple[str, str]]:
        """Keys in a file with the factors that stand there: of a stack that PEFT takes for its transpose, the other."""
        found = []
        for i, name in enumerate(self.names):
            wrappers = "base_layer." * (len(self.names) - 1 - i)
            for key, factor in (("lora_A.weight", "AB"[self.swapped]), ("lora_B.weight", "BA"[self.swapped])):
                found.append((f"{wrappers}{key}", f"{self.parts[name]}_{factor}"))
        return found

    def terms(self, name: str) -> tuple[Term, ...]:
        if name not in self.parts:
            return ()
        return (LowRank(*self._factors(name), self._buffers["slots"], self.scale),)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        part = self.parts[name]
        return getattr(self, f"{part}_A"), getattr(self, f"{part}_B")

    def change(self, name: str, slot: int) -> Tensor:
        a, b = self._factors(name)
        return self.scale * (b[slot] @ a[slot])

    def changes_anything(self) -> bool:
        return any(bool(f.detach().any()) for f in (getattr(self, f"{part}_B") for part in self.parts.values()))

    def to_file(self, key: str, tensor: Tensor) -> Tensor:
        first = key.endswith("lora_A.weight")
        tensor = tensor.transpose(1, 2) if self.swapped else tensor  # [n, r, columns] or [n, rows, r]
        if self.experts is not None:
            spread = tensor.new_zeros(self.count, *tensor.shape[1:])
            tensor = spread.index_copy_(0, torch.tensor(self.chosen, device=tensor.device), tensor)
        if first:
            return tensor.reshape(-1, tensor.shape[2]).contiguous()
        return tensor.permute(1, 2, 0).reshape(tensor.shape[1], -1).contiguous()

    def from_file(self, key: str, tensor: Tensor) -> Tensor:
        if key.endswith("lora_A.weight"):
            stack = tensor.reshape(self.count, -1, tensor.shape[1])
        else:
            stack = tensor.reshape(tensor.shape[0], -1, self.count).permute(2, 0, 1)
        stack = stack[self.chosen]
        return (stack.transpose(1, 2) if self.swapped else stack).contiguous()

    def structure(self) -> Any:
        return self.scale, *super().structure()

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Any]], where: str) -> Any:
        """The factors side by side, of scale 1."""
        first = parts[0][1]
        if len({(piece.names, piece.experts) for _, piece in parts}) > 1:
            raise ValueError(f"{where}: these adapters train other experts or stacks; they do not add up")
        made = first.copied(
            ("names", "shapes", "transposed", "count", "swapped", "experts", "scale", "parts", "stored")
        )
        made.scale = 1.0
        for part in first.parts.values():
            held = [(weight * piece.scale, piece) for weight, piece in parts]
            a = torch.cat([getattr(piece, f"{part}_A").detach() for _, piece in held], dim=1)
            b = torch.cat([size * getattr(piece, f"{part}_B").detach() for size, piece in held], dim=2)
            setattr(made, f"{part}_A", nn.Parameter(a))
            setattr(made, f"{part}_B", nn.Parameter(b))
        return made

    def exported(self, r: int) -> dict[str, Tensor]:
        """What a file of rank ``r`` and scale 1 holds."""
        made: Any = type(self).combine([(1.0, self)], "")
        made.pad(r)
        return made.tensors()

    @property
    def rank(self) -> int:
        """r."""
        return int(getattr(self, f"{next(iter(self.parts.values()))}_A").shape[1])

    def pad(self, r: int) -> None:
        """Grow to rank ``r`` with zeros, which changes nothing."""
        missing = r - self.rank
        for part in self.parts.values():
            a, b = getattr(self, f"{part}_A").detach(), getattr(self, f"{part}_B").detach()
            setattr(self, f"{part}_A", nn.Parameter(nn.functional.pad(a, (0, 0, 0, missing))))
            setattr(self, f"{part}_B", nn.Parameter(nn.functional.pad(b, (0, missing))))

    def extra_repr(self) -> str:
        return f"r={self.rank}, scale={self.scale:g}, {super().extra_repr()}"


class ExpertsChannels(ExpertsPiece):
    """``ΔW[e][:, I[e]]`` of the second stack, fp32 ``[n, out, s]`` from zero: chosen inner channels of each expert.

    They are rebuilt from gate and up in the backward, never kept. Weight decay pulls towards the base.

    Args:
        indices: int64 ``[n, s]``, sorted and distinct in each row.

    Raises:
        ValueError: ``names`` holds another stack; indices of another shape, repeated, or of no channel.
    """

    stored = {"s2ft_expert_values": "values", "s2ft_expert_indices": "indices"}

    def __init__(
        self,
        module: nn.Module,
        layout: ExpertsLayout,
        names: Sequence[str],
        indices: Tensor,
        experts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(module, layout, names, experts)
        if self.names != (layout.down,):
            raise ValueError(
                f"target_parameters: S2FT trains input channels of the experts' {layout.down}, got {list(names)}; "
                "LoRA takes either stack"
            )
        _, width, out = self.shapes[layout.down]
        self.register_buffer("indices", check_channels(indices, len(self.chosen), width).to(self.slots.device))
        held: Any = module._parameters[layout.down]
        wide = torch.promote_types(held.dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(*self._sizes(out), dtype=wide, device=held.device))

    def _sizes(self, out: int) -> tuple[int, int, int]:
        count, chosen = self._buffers["indices"].shape
        return count, out, chosen

    def terms(self, name: str) -> tuple[Term, ...]:
        if name not in self.names:
            return ()
        held: Any = self._buffers
        return (Channels(self.values, held["indices"], held["slots"]),)

    def change(self, name: str, slot: int) -> Tensor:
        _, width, out = self.shapes[name]
        held: Any = self._buffers
        return self.values.new_zeros(out, width).index_copy(1, held["indices"][slot], self.values[slot])

    def changes_anything(self) -> bool:
        return bool(self.values.detach().any())

    @classmethod
    def combine(cls, parts: Sequence[tuple[float, Any]], where: str) -> Any:
        """The union of each expert's channels; those of fewer are filled up with others, which change nothing."""
        first = parts[0][1]
        if len({(piece.names, piece.experts) for _, piece in parts}) > 1:
            raise ValueError(f"{where}: these adapters train other experts or stacks; they do not add up")
        ((_, width, out),) = first.shapes.values()
        unions = [torch.cat([piece.indices[n] for _, piece in parts]).unique() for n in range(len(first.chosen))]
        most = max(union.numel() for union in unions)
        made: Any = first.copied(("names", "shapes", "transposed", "count", "swapped", "experts"))
        made.register_buffer("indices", torch.stack([filled(union, most, width) for union in unions]))
        made.values = nn.Parameter(first.values.detach().new_zeros(len(unions), out, most))
        for weight, piece in parts:
            for n, channels in enumerate(made.indices):
                places = torch.searchsorted(channels, piece.indices[n])
                made.values.data[n].index_add_(1, places, piece.values.detach()[n], alpha=weight)
        return made

    def extra_repr(self) -> str:
        return f"channels={self.values.shape[2]}, {super().extra_repr()}"


def check_channels(indices: Tensor, experts: int, width: int) -> Tensor:
    """``indices`` as int64, sorted; ValueError unless they are ``[experts, s]`` distinct channels of ``width``."""
    if indices.dim() != 2 or indices.shape[0] != experts or not indices.numel():
        raise ValueError(f"channels of experts: wanted int64 [{experts}, s], got {tuple(indices.shape)}")
    ordered = indices.to(torch.int64).sort(dim=1).values
    repeated = bool((ordered[:, 1:] == ordered[:, :-1]).any())
    if repeated or int(ordered.min()) < 0 or int(ordered.max()) >= width:
        raise ValueError(f"channels of experts: wanted distinct numbers from 0 to {width - 1} for each expert")
    return ordered


def filled(channels: Tensor, count: int, width: int) -> Tensor:
    """``channels`` and the lowest others, ``count`` in all, sorted."""
    free = torch.ones(width, dtype=torch.bool, device=channels.device).index_fill(0, channels, False)
    others = free.nonzero().flatten()[: count - channels.numel()]
    return torch.cat([channels, others]).sort().values
