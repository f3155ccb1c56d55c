"""Look at a model's gradients and leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from ..nn.modes import modes_kept


@contextmanager
def untouched(model: nn.Module, training: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Within this context the parameters ``training`` require a gradient, none of which exists yet, and no other does.
    At its end every ``requires_grad``, ``grad`` and mode of ``model`` is as before."""
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    wanted = {id(parameter) for parameter in training}
    with modes_kept(model):
        try:
            for parameter in flags:
                parameter.requires_grad_(id(parameter) in wanted)
                parameter.grad = None
            yield
        finally:
            for parameter, (requires_grad, grad) in flags.items():
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


@contextmanager
def one_at_a_time(
    model: nn.Module, training: Mapping[str, nn.Parameter], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """:func:`untouched`, and each gradient is shown to ``see(name, gradient)`` as soon as a backward has all of it, and
    freed: no two of them exist at once. A parameter of several names is shown by each."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in training.items():
        names.setdefault(parameter, []).append(name)
    with untouched(model, names), ExitStack() as stack:
        for parameter, held in names.items():
            hook = partial(_show, names=held, see=see)
            stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        yield


def _show(parameter: Tensor, names: Iterable[str], see: Callable[[str, Tensor], None]) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None  # torch has just accumulated it
    for name in names:
        see(name, gradient)
