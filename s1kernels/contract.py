"""What an op is: `Op`, its contract, and `Arguments`, one call's arguments with symbolic shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Reason = str | None
"""Why something cannot run; None when it can."""


Result = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor that an op writes."""


class Arguments:
    """One call's arguments by name (`args.x`), and the sizes that its checks have bound (`args["B"]`).

    >>> args = Arguments("linear_residual", x=torch.zeros(2, 8), weight=torch.zeros(4, 9))
    >>> args.tensor("x", "B", "J")
    >>> args.tensor("weight", "C", "J")
    Traceback (most recent call last):
    ValueError: linear_residual: weight must be [C, J=8], got [4, 9]; check the model's dimensions
    """

    def __init__(self, op: str, **values: Any) -> None:
        self._op, self._values = op, values
        self._sizes: dict[str, int] = {}
        self._dtype: torch.dtype | None = None
        self._device: torch.device | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, symbol: str) -> int:
        return self._sizes[symbol]

    @property
    def device(self) -> torch.device | None:
        """Where the checked tensors are."""
        return self._device

    def replace(self, name: str, value: Any) -> None:
        """Add an argument, or put another value in its place."""
        self._values[name] = value

    def tensor(self, name: str, *shape: str | int, dtype: torch.dtype | None = None) -> None:
        """Check one tensor. Symbols in `shape`, the floating dtype and the device are bound where they first appear."""
        value = self._values[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"{self._op}: {name} must be a tensor, got {type(value).__name__}; pass a torch.Tensor")
        self._check_shape(name, value, shape)
        if dtype is None:
            self._dtype = self._dtype or value.dtype
        expected = dtype or self._dtype
        if value.dtype != expected or (dtype is None and value.dtype not in FLOATS):
            allowed = _name(expected) if expected in FLOATS or dtype else "a floating dtype"
            raise TypeError(f"{self._op}: {name} must be {allowed}, got {_name(value.dtype)}; convert it with .to()")
        self._device = self._device or value.device
        self.require(value.device == self._device, name, f"on {self._device}", value.device, "move it with .to()")
        self.require(value.is_contiguous(), name, "contiguous", f"strides {value.stride()}", "call .contiguous()")

    def optional(self, name: str, *shape: str | int, dtype: torch.dtype | None = None) -> None:
        """As `tensor`, but None passes."""
        if self._values[name] is not None:
            self.tensor(name, *shape, dtype=dtype)

    def require(self, holds: bool, name: str, expected: str, got: object, advice: str) -> None:
        """Raise ValueError in the house's wording unless `holds`."""
        if not holds:
            raise ValueError(f"{self._op}: {name} must be {expected}, got {got}; {advice}")

    def _check_shape(self, name: str, value: Tensor, shape: tuple[str | int, ...]) -> None:
        sizes = [self._sizes.get(d) if isinstance(d, str) else d for d in shape]
        same_rank = value.dim() == len(shape)
        if not same_rank or any(s is not None and s != v for s, v in zip(sizes, value.shape, strict=True)):
            named = [d if s is None or isinstance(d, int) else f"{d}={s}" for d, s in zip(shape, sizes, strict=True)]
            text = f"[{', '.join(map(str, named))}]"
            raise ValueError(
                f"{self._op}: {name} must be {text}, got {list(value.shape)}; check the model's dimensions"
            )
        self._sizes.update((d, v) for d, v in zip(shape, value.shape, strict=True) if isinstance(d, str))


@dataclass(frozen=True)
class Op:
    """An op's contract. The modules of `s1kernels.ops` define one each; calling it runs the back end in force.

    name: the join key: the op's files in every back end carry it.
    schema: arguments and what they mutate, as torch.library writes them; what begins with `out` comes last.
    reference: the meaning: takes the arguments without `out`, returns the result, runs in float64.
    check: raises ValueError or TypeError for bad arguments, by shape and dtype alone.
    results: shape and dtype of each tensor of the result.
    inputs: draws the arguments of one case (`make` is a `testing.Make`); cases: the sizes, by name.
    bytes_moved: what a perfect implementation reads and writes, in bytes.
    verdict: judges an integer result that differs, (args, result, truth) -> complaint or None; None: none may.
    tolerance: relative error allowed, by the dtype of the inputs; None: one rounding to each output's own dtype.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    check: Callable[[Arguments], None]
    results: Callable[[Arguments], tuple[Result, ...]]
    inputs: Callable[..., tuple]
    cases: Mapping[str, Mapping[str, Any]]
    bytes_moved: Callable[[Arguments], int]
    verdict: Callable[[Arguments, Tensor, Tensor], Reason] | None = None
    tolerance: Mapping[torch.dtype, float] | None = None
    impls: dict[str, Any] = field(default_factory=dict, repr=False)

    def __call__(self, *args: Any, out: Any = None) -> Any:
        """Run the op and return `out`, allocated when not given. Every back end obeys the reference's docstring."""
        if out is None:
            out = self.empty(self.checked(*args))
        getattr(torch.ops.s1kernels, self.name)(*args, *as_tuple(out))
        return out

    def checked(self, *args: Any) -> Arguments:
        """The arguments by name, checked."""
        named = Arguments(self.name, **dict(zip(self.parameters, args, strict=True)))
        self.check(named)
        return named

    def empty(self, args: Arguments) -> Any:
        """An uninitialised result: a tensor, or a tuple of them."""
        out = tuple(torch.empty(shape, dtype=dtype, device=args.device) for shape, dtype in self.results(args))
        return out if len(out) > 1 else out[0]

    def check_out(self, args: Arguments, out: tuple[Any, ...]) -> None:
        """Raise unless `out` has the result's shapes and dtypes, on the arguments' device."""
        for i, (tensor, (shape, dtype)) in enumerate(zip(out, self.results(args), strict=True)):
            name = "out" if len(out) == 1 else f"out[{i}]"
            args.replace(name, tensor)
            args.tensor(name, *shape, dtype=dtype)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the arguments, without `out`."""
        return tuple(inspect.signature(self.reference).parameters)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes that the tensors occupy."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def as_tuple(value: Any) -> tuple:
    """A tuple or list as a tuple, anything else as a tuple of one."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
