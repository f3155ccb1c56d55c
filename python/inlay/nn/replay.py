"""Run a model from its first trained block on, with hidden states of an earlier run in the place of what is below.

Two mixins: frozen blocks hand their input on, and the first trained one takes the states that are held for it. All
else of the model's forward (embeddings, positions, masks, its own loop) runs as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import block_stacks
from .mixed import Mixed, mix, unmix
from .modes import evaluating


class Replay:
    """What a model does at its boundary, the input of its first trained block.

    Attributes:
        seen: that input in the last forward, ``[..., H]``, detached.
        depends: whether it required a gradient.
        held: states to run from in the next forwards; None: everything runs.
    """

    def __init__(self) -> None:
        self.seen: Tensor | None = None
        self.depends = False
        self.held: Callable[[Tensor], Tensor] | None = None  # makes what stands in the place of the input it is given


class Skipped(Mixed):
    """Mixin of a frozen block below the boundary. Overrides ``__call__``, so that no hook and no checkpoint runs."""

    inlay_replay: Replay

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.inlay_replay.held is not None:
            return args[0]
        output = super().__call__(*args, **kwargs)
        if not isinstance(output, Tensor) or not args or output.shape != args[0].shape:
            raise TypeError(f"wanted blocks that return hidden states alone, got {type(self).__name__}")
        return output


class Boundary(Mixed):
    """Mixin of the first trained block."""

    inlay_replay: Replay

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        replay = self.inlay_replay
        if replay.held is not None:
            hidden = replay.held(hidden)
        else:
            replay.seen, replay.depends = hidden.detach(), hidden.requires_grad
        return super().__call__(hidden, *args, **kwargs)


def frozen_blocks(model: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """The blocks below the first trained one, and that one. What trains outside blocks has to come after it, which
    :func:`check_replays` looks at.

    Raises:
        ValueError: no block trains, or the first one does, or blocks of several stacks do.
    """
    stacks = [(list(stack), [_trains(block) for block in stack]) for stack in block_stacks(model).values()]
    trained = [(blocks, trains.index(True)) for blocks, trains in stacks if any(trains)]
    if len(trained) != 1 or trained[0][1] == 0:
        found = "the first block trains" if trained and trained[0][1] == 0 else f"blocks of {len(trained)} stacks train"
        raise ValueError(
            f"wanted a model whose lowest blocks are frozen, got one in which {found}; train the upper ones alone, as "
            "inlay.FreezeLayers does"
        )
    blocks, place = trained[0]
    return blocks[:place], blocks[place]


def _trains(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


@contextmanager
def replayable(model: nn.Module) -> Iterator[Replay]:
    """Within this context ``model`` notes what enters its first trained block, and can run from there."""
    below, first = frozen_blocks(model)
    replay = Replay()
    for block in (*below, first):
        mix(block, Boundary if block is first else Skipped)
        block.inlay_replay = replay
    try:
        yield replay
    finally:
        for block in (*below, first):
            unmix(block)


def check_replays(model: nn.Module, ids: Tensor) -> Tensor:
    """Run ``ids [1, T]`` whole and from the boundary; the states there, ``[1, T, H]``.

    Raises:
        ValueError: something trains before the boundary, the frozen part draws random numbers, or what is above takes
            more from it than hidden states.
    """
    first = frozen_blocks(model)[1]
    with replayable(model) as replay, evaluating(model), torch.random.fork_rng(devices=[]):
        whole = model(input_ids=ids, use_cache=False).logits
        states = _seen(replay)
        if replay.depends:
            raise ValueError("something outside the blocks trains before them, such as embeddings; freeze it")
        replay.held = lambda hidden: states.clone()
        again = model(input_ids=ids, use_cache=False).logits
        replay.held = None
        for module in _up_to(model, first):
            module.training = True
        drawn = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            model(input_ids=ids, use_cache=False)
            drawn.append(_seen(replay))
    if not torch.equal(whole, again):
        raise ValueError("what trains takes more from the frozen blocks than hidden states; leave cache_frozen out")
    if not torch.equal(*drawn):
        raise ValueError(
            "the frozen blocks draw random numbers in training (dropout), so that no two epochs see the same states; "
            "set their dropout to 0, or leave cache_frozen out"
        )
    return states


def _up_to(model: nn.Module, first: nn.Module) -> Iterator[nn.Module]:
    """What may run before ``first``: all modules but the model itself, and the blocks from ``first`` on."""
    stack = next(stack for stack in block_stacks(model).values() if any(block is first for block in stack))
    later: set[nn.Module] = set()
    for block in reversed(stack):
        later.update(block.modules())
        if block is first:
            break
    return (module for module in model.modules() if module is not model and module not in later)


def _seen(replay: Replay) -> Tensor:
    if replay.seen is None:
        raise ValueError("the first trained block did not run, so that nothing can run from there")
    return replay.seen
