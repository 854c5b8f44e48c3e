"""The registry: who implements which op, who is tried first, and why somebody cannot.

Every op is one `torch.ops.s1kernels.<name>`: torch.compile and opcheck see the same op whichever back end serves it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s1kernels.contract import Op, Reason, as_tuple


class BackendError(RuntimeError):
    """A back end that was asked for by name cannot run here, or cannot take these arguments."""


@dataclass(frozen=True)
class Impl:
    """One back end's implementation of one op.

    run: takes the op's arguments, `out` last, and returns nothing.
    supports: why it cannot take these arguments (without `out`), or None.
    bind: for decode_frame: binds a model once, (config, weights, head, fast_rows) -> a program that the engine calls.
    """

    backend: str
    run: Callable[..., None]
    supports: Callable[..., Reason] | None = None
    bind: Callable[..., Any] | None = None

    def refusal(self, *args: Any) -> Reason:
        """Why this implementation cannot serve a call with `args` (the op's arguments without `out`)."""
        return BACKENDS[self.backend]() or (self.supports(*args) if self.supports else None)


OPS: dict[str, Op] = {}
BACKENDS: dict[str, Callable[[], Reason]] = {}
ORDER: dict[str, tuple[str, ...]] = {}
"""Device type -> back ends in the order that "auto" tries them. Filled by `s1kernels.backends`."""

_LIBRARY = torch.library.Library("s1kernels", "DEF")
_CHOICE: ContextVar[Mapping[str, str]] = ContextVar("s1kernels_backend", default={})  # noqa: B039  (never mutated)


def define(op: Op) -> Op:
    """Enter an op into the catalogue and register it with torch.library. Its reference becomes its first back end."""
    count = len(op.parameters)

    def fake(*args: Any) -> None:
        op.check_out(op.checked(*args[:count]), args[count:])

    def run(*args: Any) -> None:
        fake(*args)
        given, out = args[:count], args[count:]
        choose(op.name, *given).run(*given, out if len(out) > 1 else out[0])

    def reference(*args: Any) -> None:
        *given, out = args
        for destination, value in zip(as_tuple(out), as_tuple(op.reference(*given)), strict=True):
            destination.copy_(value)

    _LIBRARY.define(op.name + op.schema)
    _LIBRARY.impl(op.name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"s1kernels::{op.name}", fake, lib=_LIBRARY)
    op.impls["reference"] = Impl("reference", reference)
    OPS[op.name] = op
    return op


def add_backend(name: str, available: Callable[[], Reason]) -> None:
    """Enter a back end; `available()` says why this machine cannot use it, or None."""
    BACKENDS[name] = available


def implement(
    op_name: str, *, backend: str, supports: Callable[..., Reason] | None = None, bind: Callable[..., Any] | None = None
) -> Callable:
    """Decorator: the function implements `op_name` for `backend` (see `Impl`); its parameters are the op's, then
    `out`."""

    def enter(run: Callable[..., None]) -> Callable[..., None]:
        op, names = OPS[op_name], list(inspect.signature(run).parameters)
        if names != [*op.parameters, "out"]:
            raise TypeError(f"{backend}.{op_name} takes {names}, its contract says {[*op.parameters, 'out']}")
        op.impls[backend] = Impl(backend, run, supports, bind)
        return run

    return enter


def choice(op_name: str) -> str:
    """The back end asked for (`use_backend`, else S1KERNELS_BACKEND), or "auto"."""
    chosen = _CHOICE.get()
    return chosen.get(op_name) or chosen.get("*") or os.environ.get("S1KERNELS_BACKEND") or "auto"


def candidates(op_name: str, device: str) -> list[Impl]:
    """The implementations of an op for a device type, in the order that "auto" tries them."""
    impls = OPS[op_name].impls
    return [impls[name] for name in ORDER.get(device, ("reference",)) if name in impls]


def choose(op_name: str, *args: Any, backend: str | None = None) -> Impl:
    """The implementation that serves a call. An explicit choice that cannot serve it raises `BackendError`.

    `backend` "auto" leaves the choice to `use_backend` and S1KERNELS_BACKEND, and then to the order.
    """
    wanted = choice(op_name) if backend in (None, "auto") else str(backend)
    if wanted != "auto":
        impl = OPS[op_name].impls.get(_known(wanted))
        reason = impl.refusal(*args) if impl else BACKENDS[wanted]() or f"it does not implement {op_name}"
        if impl is None or reason:
            raise BackendError(f"{op_name}: back end {wanted!r} cannot serve this call: {reason}")
        return impl
    for impl in candidates(op_name, _device(args)):
        if impl.refusal(*args) is None:
            return impl
    raise BackendError(f"{op_name}: no back end serves this call: {explain(op_name, *args)}")


def explain(op_name: str, *args: Any) -> dict[str, Reason]:
    """Back end -> why it cannot serve this call, or None if it can, in the order that "auto" tries them."""
    if op_name not in OPS:
        raise ValueError(f"op must be one of {sorted(OPS)}, got {op_name!r}")
    return {impl.backend: impl.refusal(*args) for impl in candidates(op_name, _device(args))}


@contextlib.contextmanager
def use_backend(backend: str | Mapping[str, str]) -> Iterator[None]:
    """Within the block, ops run on `backend`: one name for all, or {op name: back end}."""
    chosen = {"*": backend} if isinstance(backend, str) else dict(backend)
    for op_name, name in chosen.items():
        if op_name != "*" and op_name not in OPS:
            raise ValueError(f"backend: op must be one of {sorted(OPS)}, got {op_name!r}")
        if name != "auto":
            _known(name)
    token = _CHOICE.set(chosen if "*" in chosen else {**_CHOICE.get(), **chosen})
    try:
        yield
    finally:
        _CHOICE.reset(token)


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {name!r}")
    return name


def _device(args: tuple) -> str:
    return next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")
