"""What a module of experts computes, found by its structure and proven on the module's own forward.

transformers keeps the experts of a mixture as two stacks of matrices, ``[E, out, in]`` or ``[E, in, out]``, maybe with
biases, of which the first makes gate and up (one beside the other, or interleaved) or up alone. The module gets tokens,
their experts and the weights of those; or, as Llama 4 has it, rows that are sorted already, equally many per expert.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops._registry import autocast_dtype
from ..ops.expert_gate import Gate
from ..ops.expert_linear import RowPlan, plan_rows
from ..ops.expert_mlp import Term, expert_down, expert_up
from ..sites import holds_experts
from .probe import generator, same_at_all_sizes, settings_in_both_modes, shallow, signature_of


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module's parameters make its experts.

    Attributes:
        up, down: names of the two stacks. up_bias, down_bias: of their biases ``[E, out]``, or None.
        transposed: a stack is ``[E, in, out]``.
        gate: the gated activation; None where the module's own ``_apply_gate`` or ``act_fn`` is called.
        arguments: names of the forward's: tokens, experts, weights; or rows alone, equally many for each expert.
    """

    up: str
    down: str
    up_bias: str | None
    down_bias: str | None
    transposed: bool
    gate: Gate | None
    arguments: tuple[str, ...]

    @property
    def sorted(self) -> bool:
        """True where the module gets rows that are sorted by expert."""
        return len(self.arguments) == 1

    def stack(self, module: nn.Module, name: str) -> Tensor:
        """One of the stacks as ``[E, in, out]``, a view."""
        held = getattr(module, name)
        return held if self.transposed else held.transpose(1, 2)


def experts_of(module: nn.Module) -> int:
    """E."""
    return next(p.shape[0] for p in module._parameters.values() if p is not None and p.dim() == 3)


# --- what it computes -------------------------------------------------------------------------------------


def compute_experts(
    module: Any,
    layout: ExpertsLayout,
    x: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    up_terms: tuple[Term, ...] = (),
    down_terms: tuple[Term, ...] = (),
) -> Tensor:
    """The module's output ``[T, H]`` for tokens ``x [T, H]``, their experts ``index`` and ``weights [T, K]``."""
    dtype = autocast_dtype(x)
    up, down = (layout.stack(module, name).to(dtype) for name in (layout.up, layout.down))  # maybe PEFT's, parametrized
    plan, weights = _plan(up.shape[0], x, index, weights)
    biases = [None if name is None else getattr(module, name).to(dtype) for name in (layout.up_bias, layout.down_bias)]
    gu = expert_up(x.to(dtype), plan, up, biases[0], up_terms)
    h = gu if layout.gate is not None else _own_activation(module, gu)
    return expert_down(h, weights, plan, down, biases[1], layout.gate, down_terms).to(x.dtype)


def _plan(experts: int, x: Tensor, index: Tensor | None, weights: Tensor | None) -> tuple[RowPlan, Tensor]:
    if index is not None and weights is not None:
        return plan_rows(index, experts), weights
    numbers = torch.arange(experts, device=x.device).repeat_interleave(x.shape[0] // experts)
    return plan_rows(numbers[:, None], experts), torch.ones(x.shape[0], 1, device=x.device)


def _own_activation(module: Any, gu: Tensor) -> Tensor:
    gated = hasattr(module, "_apply_gate") and getattr(module, "has_gate", True)
    return module._apply_gate(gu) if gated else module.act_fn(gu)


# --- the proof --------------------------------------------------------------------------------------------

#: Widths of the module that is tried: of the tokens, and of what is between the two products.
_HIDDEN, _INNER, _TOKENS = 6, 10, 7


def experts_settings(module: nn.Module) -> dict[str, Any] | None:
    """``inlay_experts``, the layout of a module of experts, or None if ``module`` is none that is understood."""
    if not holds_experts(module) or "forward" in module.__dict__:
        return None
    names = _arguments(module)
    if len(names) not in (1, 3):
        return None
    for layout, gated in _candidates(module, names):
        twin, inputs = _twin(module, layout, gated)
        index, weights = inputs if len(names) == 3 else (None, None)
        theirs = partial(_called, twin, inputs if len(names) == 3 else ())
        ours = partial(_computed, twin, layout, index, weights)
        if same_at_all_sizes(theirs, ours, _tokens(module, len(names) == 1)):
            return {"inlay_experts": layout}
    return None


def _called(twin: nn.Module, more: tuple[Tensor, ...], x: Tensor) -> Tensor:
    return twin(x, *more)


def _computed(
    twin: nn.Module, layout: ExpertsLayout, index: Tensor | None, weights: Tensor | None, x: Tensor
) -> Tensor:
    return compute_experts(twin, layout, x, index, weights)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    _, *others = inspect.signature(type(module).forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in others) if all(p.kind in plain for p in others) else ()


def _candidates(module: nn.Module, arguments: tuple[str, ...]) -> Iterator[tuple[ExpertsLayout, bool]]:
    """Layouts that the shapes allow, the common ones first; and whether the first stack makes gate and up."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    stacks = [name for name, p in own.items() if p.dim() == 3]
    biases = [name for name, p in own.items() if p.dim() == 2]
    for (up, down), transposed, gated in itertools.product((stacks, stacks[::-1]), (False, True), (True, False)):
        wide, back = own[up].shape[1:], own[down].shape[1:]
        (out, width), (end, inner) = (wide[::-1], back[::-1]) if transposed else (wide, back)
        if out != inner * (1 + gated) or width != end or own[up].shape[0] != own[down].shape[0]:
            continue
        for one, other in [(None, None)] if not biases else (biases, biases[::-1]):
            for gate in _gates(module) if gated else (None,):
                yield ExpertsLayout(up, down, one, other, transposed, gate, arguments), gated


def _gates(module: nn.Module) -> Iterator[Gate | None]:
    for act, interleaved in itertools.product(("silu", "gelu_tanh", "gelu"), (False, True)):
        yield Gate(act, interleaved)
    numbers = {float(v) for v in vars(module).values() if isinstance(v, float) and v > 0}
    for alpha, limit, plus, interleaved in itertools.product(
        sorted(numbers | {1.0}), sorted(numbers), (0.0, 1.0), (False, True)
    ):
        yield Gate("clamped", interleaved, alpha, limit, plus)
    yield None


def _tokens(module: nn.Module, is_sorted: bool) -> Tensor:
    rows = 2 * experts_of(module) if is_sorted else _TOKENS
    return torch.randn(rows, _HIDDEN, generator=generator())


def _twin(module: nn.Module, layout: ExpertsLayout, gated: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A small module of the same class and number of experts with random weights, and experts with their weights."""
    random, experts = generator(), experts_of(module)
    random.manual_seed(20260102)
    shapes = {layout.up: (_INNER * (1 + gated), _HIDDEN), layout.down: (_HIDDEN, _INNER)}
    small = {
        name: torch.randn(experts, *(shape[::-1] if layout.transposed else shape), generator=random)
        for name, shape in shapes.items()
    }
    for bias, name in ((layout.up_bias, layout.up), (layout.down_bias, layout.down)):
        if bias is not None:
            small[bias] = torch.randn(experts, shapes[name][0], generator=random)
    twin: Any = shallow(module, {}, small)
    width = getattr(module, layout.up).shape[1 if layout.transposed else 2]
    for name, value in vars(module).items():  # what it says of its own width
        if type(value) is int and value == width != experts:
            twin.__dict__[name] = _HIDDEN
    if getattr(module, "config", None) is not None:
        twin.__dict__["config"] = _eagerly(module.config)
    count = min(experts, 3)
    index = torch.rand(_TOKENS, experts, generator=random).topk(count).indices
    index[0] = index[1]  # several rows of one expert, whatever their number
    return twin, (index, torch.rand(_TOKENS, count, generator=random) - 0.3)


def _eagerly(config: Any) -> Any:
    """A copy of ``config`` in which experts run as their class has it."""
    try:
        held = copy.copy(config)
        held._experts_implementation = "eager"
    except Exception:  # a config of another kind
        return SimpleNamespace(_experts_implementation="eager")
    return held


_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, ExpertsLayout | None]] = WeakKeyDictionary()
_BY_KIND: dict[Any, ExpertsLayout | None] = {}


def layout_of(module: nn.Module) -> ExpertsLayout | None:
    """The proven layout of a module of experts, None where there is none; a kind of module is proven once."""
    held = module.__dict__.get("inlay_experts")
    if held is not None or not holds_experts(module):
        return held
    kind = (type(module), signature_of(module))
    if module in _KNOWN and _KNOWN[module][0] == kind:
        return _KNOWN[module][1]
    if kind not in _BY_KIND:
        found = settings_in_both_modes(module, experts_settings)
        _BY_KIND[kind] = None if found is None else found["inlay_experts"]
    _KNOWN[module] = kind, _BY_KIND[kind]
    return _BY_KIND[kind]
