"""Raw ops: one name, a plain-torch reference, a fake for tracing, a native kernel where one is built.

A raw op carries no autograd: gradients are written once, in the autograd.Function of the op's file.
Calls on plain dense CPU or CUDA tensors go straight to the kernel (7 us); everything else (torch.compile,
FakeTensor, dispatch modes, tensor subclasses) goes through torch.ops.inlay.<name> (25 us), where torch
can see the op and its fake.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay import _native

LIBRARY = torch.library.Library("inlay", "DEF")
RAW_OPS: dict[str, RawOp] = {}

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int16, torch.uint8)
_FORCED_CHOICES = (None, "reference", "native")


def _forced_from_environment() -> str | None:
    forced = os.environ.get("INLAY_FORCE_PATH") or None
    if forced not in _FORCED_CHOICES:
        raise ValueError(f"INLAY_FORCE_PATH: wanted reference or native, got {forced!r}; unset it to let inlay choose")
    return forced


_forced = _forced_from_environment()


def forced() -> str | None:
    """The path that every raw op is held to: "reference", "native", or None."""
    return _forced


@contextlib.contextmanager
def force_path(path: str | None) -> Iterator[None]:
    """Run every raw op on its "reference" or its "native" path (None: choose) inside this context."""
    global _forced
    if path not in _FORCED_CHOICES:
        raise ValueError(f"force_path: wanted 'reference', 'native' or None, got {path!r}")
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from (item for item in arg if isinstance(item, Tensor))


def in_plain_torch(args: Sequence[Any]) -> bool:
    """True where a tensor's data_ptr() is what it seems: no tracing, no modes, no subclasses."""
    if not _no_modes():
        return False
    for arg in args:  # loops, not generators: this runs hundreds of times per decoded token
        if isinstance(arg, Tensor):
            if type(arg) not in _PLAIN_TYPES or not (arg.is_cpu or arg.is_cuda) or arg.layout is not torch.strided:
                return False
        elif isinstance(arg, (list, tuple)) and not in_plain_torch(arg):
            return False
    return True


def _plain_and_native(args: Sequence[Any]) -> bool:
    """in_plain_torch (but for modes) and _all_native in one pass: what nearly every call of a kernel is."""
    for arg in args:
        if isinstance(arg, Tensor):
            if type(arg) not in _PLAIN_TYPES or arg.dtype not in _NATIVE_DTYPES or arg.layout is not torch.strided:
                return False
            if not _native.runs_on(arg):
                return False
        elif isinstance(arg, (list, tuple)) and not _plain_and_native(arg):
            return False
    return True


def _no_modes() -> bool:
    return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None


def _all_native(args: Sequence[Any]) -> bool:
    """True where a native kernel knows every tensor's device and dtype."""
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.dtype not in _NATIVE_DTYPES or not _native.runs_on(arg):
                return False
        elif isinstance(arg, (list, tuple)) and not _all_native(arg):
            return False
    return True


class _NoContext:
    """What a Function's forward sees where no gradient can be asked for: it keeps nothing."""

    def __init__(self, count: int):
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Nothing will be read back."""


def apply(function: Any, *args: Any) -> Any:
    """`function.apply`, without autograd's bookkeeping (15 us) where gradients are off, as in decoding."""
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(_NoContext(len(args)), *args)


class RawOp:
    """One entry of csrc/ops.h seen from Python."""

    def __init__(self, reference: Callable, native: Callable, fake: Callable, mutates: tuple[str, ...]):
        self.name = reference.__name__
        self.reference, self.native, self.fake = reference, native, fake
        functools.update_wrapper(self, reference)
        schema = torch.library.infer_schema(reference, mutates_args=mutates)
        LIBRARY.define(f"{self.name}{schema}", tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"inlay::{self.name}", fake, lib=LIBRARY)
        self.overload = getattr(torch.ops.inlay, self.name).default
        RAW_OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        if _forced is None and _native.available() and _no_modes() and _plain_and_native(args):
            return self.native(*args)  # the short way: a decoded token takes hundreds of these calls
        return self.run(*args) if in_plain_torch(args) else self.overload(*args)

    def run(self, *args: Any) -> Any:
        return (self.native if self._goes_native(args) else self.reference)(*args)

    def _goes_native(self, args: Sequence[Any]) -> bool:
        if _forced == "reference":
            return False
        fits = _all_native(args)
        if _forced == "native":
            _native.module()  # raises, saying what is missing
            if not fits:
                got = sorted({f"{t.device.type} {t.dtype}" for t in _tensors(args)})
                devices = "CPU or CUDA" if _native.has_cuda() else "CPU"
                raise RuntimeError(
                    f"inlay.{self.name}: INLAY_FORCE_PATH=native wanted {devices} tensors of float32, bfloat16 "
                    f"or float16, got {', '.join(got)}; unset INLAY_FORCE_PATH"
                )
        return fits and _native.available()


def raw_op(*, native: Callable, fake: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], RawOp]:
    """Register the decorated plain-torch reference as a raw op."""
    return lambda reference: RawOp(reference, native, fake, mutates)


# --- checks and small helpers every op uses ------------------------------------------------------------


def fail(op: str, argument: str, wanted: str, got: object, do: str, kind: type[Exception] = ValueError) -> None:
    raise kind(f"inlay.{op}: {argument}: wanted {wanted}, got {got}; {do}")


def check_same(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor, shape: bool = False) -> None:
    """`tensor` must share dtype and device (and shape, if asked) with `like`."""
    if tensor.dtype != like.dtype:
        fail(
            op,
            name,
            f"{like.dtype} as {like_name}",
            tensor.dtype,
            f"cast one of them with .to({like.dtype})",
            TypeError,
        )
    check_device(op, name, tensor, like_name, like)
    if shape and tensor.shape != like.shape:
        fail(op, name, f"shape {tuple(like.shape)} as {like_name}", tuple(tensor.shape), "pass equal shapes")


def check_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        fail(op, name, f"{like.device} as {like_name}", tensor.device, "move them to one device")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        fail(op, name, "a float32, bfloat16 or float16 tensor", tensor.dtype, "cast it first", TypeError)


def check_indices(op: str, indices: Tensor, like: Tensor) -> None:
    if indices.dtype != torch.int64 or indices.dim() != 1:
        got = f"{indices.dtype} with {indices.dim()} dimensions"
        fail(
            op, "indices", "int64 with 1 dimension", got, "pass sorted unique channel numbers as torch.int64", TypeError
        )
    check_device(op, "indices", indices, "the activations", like)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for every activation dtype; float64 stays float64 (references only: gradcheck, oracles)."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """[..., N] as [M, N] with unit inner stride: a view where the strides allow, otherwise a copy."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def unit_inner(x: Tensor) -> Tensor:
    """``x``, or a copy of it in which neighbours of the last dimension are neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


@contextlib.contextmanager
def writable_rows(x: Tensor) -> Iterator[Tensor]:
    """[..., N] as [M, N] rows to be written: `x`'s own memory, or a copy that is written back."""
    rows = as_rows(x)
    yield rows
    if rows.data_ptr() != x.data_ptr() and x.numel():
        x.detach().copy_(rows.view(x.shape))


def autocast_enabled(device: str) -> bool:
    """torch.is_autocast_enabled, which knows no autocast for tensors without data and says so by raising."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _first_device(args: Sequence[Any]) -> str:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device.type
    return next(_tensors(args)).device.type


def without_views(function: Callable) -> Callable:
    """Decorator for Function.forward: outputs are ordinary tensors, which whoever gets them may change in place.

    Autograd refuses that for views that a Function returns, and a product is one where it was computed as rows. The
    memory is the same, and the outputs' own.
    """

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        outputs = function(*args)
        if type(args[0]) is _NoContext:
            return outputs  # without gradients a view is as good
        return tuple(map(_ordinary, outputs)) if isinstance(outputs, tuple) else _ordinary(outputs)

    return wrapped


def _ordinary(tensor: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.aten._unsafe_view.default(tensor, tensor.shape)
    return tensor.data if tensor._is_view() else tensor  # 0.2 us, where _unsafe_view takes 2


def without_autocast(function: Callable) -> Callable:
    """Decorator for Function.forward / backward: the body chooses its own dtypes."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        device = _first_device(args)
        if not autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return wrapped


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear layer would compute in for `x` here."""
    device = x.device.type
    if autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
