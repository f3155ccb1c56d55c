"""Where a piece can sit: linears, and other modules with an output; and where blocks, norms and embeddings are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .bases.linear import is_linear
from .bases.quantized import QuantizedWeight


@dataclass(frozen=True)
class Site:
    """A place in a model.

    Attributes:
        path: full name of the module as ``named_modules`` has it.
    """

    path: str

    def module(self, model: nn.Module) -> nn.Module:
        """The module at this place."""
        return model.get_submodule(self.path)


class LinearSite(Site):
    """A linear of any storage: ``nn.Linear``, transformers' Conv1D, a quantized one. Takes a ``LinearPiece``."""


class ExpertsSite(Site):
    """A module of a mixture's experts, which holds them as stacks of matrices. Takes an ``ExpertsPiece``."""


class OutputSite(Site):
    """Any other module of one input and one output: a norm, an embedding. Takes a ``Piece``."""


def site_of(model: nn.Module, path: str) -> Site:
    """The site of a piece on the module ``path``."""
    module = model.get_submodule(path)
    if is_linear(module) or isinstance(module, QuantizedWeight):
        return LinearSite(path)
    return ExpertsSite(path) if holds_experts(module) else OutputSite(path)


def holds_experts(module: nn.Module) -> bool:
    """True for a module with two stacks ``[E, ., .]`` of matrices of its own, and at most biases beside them."""
    own = [p for p in module._parameters.values() if p is not None]
    others = [p for p in own if p.dim() != 3]
    return len(own) - len(others) == 2 and len(others) in (0, 2) and all(p.dim() == 2 for p in others)


def block_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost ``nn.ModuleList``s by name: the stacks of blocks of a transformer."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in stacks):
            stacks[name] = module
    return stacks


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the blocks, from the input up: the elements of the stacks that hold linears (encoder before decoder)."""
    return [
        f"{name}.{place}"
        for name, stack in block_stacks(model).items()
        for place, block in enumerate(stack)
        if any(is_linear(module) or isinstance(module, QuantizedWeight) for module in block.modules())
    ]


def names_above(key: str) -> list[str]:
    """The name of a tensor or module itself, and those of the modules that it is in, the outermost first."""
    parts = key.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def block_of(key: str, blocks: list[str]) -> str | None:
    """The block that a module or tensor is in, or None."""
    return next((block for block in blocks if key.startswith(f"{block}.")), None)


def tensors_around(model: nn.Module) -> tuple[list[str], list[str]]:
    """Keys of the parameters outside the blocks: those that stand below the last stack, and those above it.

    Below are embeddings (a head that is tied to one as well) and whatever belongs to an earlier stack; above are the
    last norm, projections after it and the head. Tied ones appear under their first name.
    """
    blocks, stacks = blocks_of(model), list(block_stacks(model))
    earlier = [stack.rpartition(".")[0] for stack in {block.rpartition(".")[0]: None for block in blocks}][:-1]
    below: list[str] = []
    above: list[str] = []
    for key, _ in model.named_parameters():
        if ".deltas." in key or block_of(key, blocks) is not None or any(key.startswith(f"{s}.") for s in stacks):
            continue
        inside = any(key.startswith(f"{holder}.") for holder in earlier if holder)
        (below if inside or _embeds(model, key) else above).append(key)
    return below, above


def _embeds(model: nn.Module, key: str) -> bool:
    """Whether a parameter is an embedding's, or that of a module of embeddings (BERT's have a norm of their own)."""
    holders = [model.get_submodule(path) for path in names_above(key)[:-1]]
    return any(isinstance(held, nn.Embedding) or "embed" in type(held).__name__.lower() for held in holders) or any(
        "embed" in part for part in key.split(".")
    )


def is_norm(module: nn.Module) -> bool:
    """True for layer and RMS norms of any family, by their class: a vector of weights and no other module."""
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return named and isinstance(weight, nn.Parameter) and weight.dim() == 1 and not module._modules.keys() - {"deltas"}
