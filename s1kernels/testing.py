"""Contract checks: shared by the tests, the benches' correctness gate and `s1kernels verify`.

Truth is an op's reference in float64 on the same inputs. Results are poisoned before the call and stand between guard
bands; a call is repeated and must give the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from s1kernels import registry
from s1kernels.contract import Op, as_tuple

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE_ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Relative error of one rounding to a dtype, sums in float32 included."""

GUARD = 64  # elements on either side of a guarded tensor
OFFSET = 3  # elements by which inputs are moved off any alignment


class Make:
    """Draws a case's tensors: randn + 0.5, scaled, contiguous but cut from larger ones, so that nothing is aligned
    (with `offset` 0: aligned as models are).

    >>> Make(torch.float32, seed=0)(2, 3).shape
    torch.Size([2, 3])
    """

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0, offset: int = OFFSET) -> None:
        self.dtype, self.device, self.offset = dtype, device, offset
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = (torch.randn(shape, generator=self.generator) + 0.5) * scale
        return self._place(values.to(dtype or self.dtype))

    def ints(self, *shape: int, low: int = 0, high: int) -> Tensor:
        """int32 in [low, high)."""
        return self._place(torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32))

    def exponential(self, *shape: int) -> Tensor:
        """float32, exponential with rate 1."""
        return self._place(torch.empty(shape).exponential_(1, generator=self.generator))

    def scalar(self, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=self.device)

    def _place(self, values: Tensor) -> Tensor:
        return clone(values.to(self.device), offset=self.offset)


@dataclass(frozen=True)
class Outcome:
    """What one contract check found. `error` and `reference_error` are the worst relative errors against float64."""

    op: str
    backend: str
    case: str
    dtype: torch.dtype
    complaint: str | None
    error: float
    reference_error: float
    tolerance: float


def rel_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||, over the whole or over the worst last-dimension row, whichever is larger."""
    value, truth = (t.double().reshape(-1, t.shape[-1]) for t in (value, truth))
    if truth.numel() == 0:
        return 0.0
    rows = (value - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=1e-30)
    whole = (value - truth).norm() / truth.norm().clamp(min=1e-30)
    worst = torch.maximum(rows.max(), whole)
    return float("inf") if worst.isnan() else float(worst)


def poison(tensor: Tensor) -> Tensor:
    """Fill with NaN (integers: the least value), in place, so that what is not written shows."""
    return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def guarded(like: Tensor) -> tuple[Tensor, Tensor]:
    """A poisoned tensor like `like`, and the poisoned room round it: anything else in the bands means a stray write."""
    room = poison(torch.empty(like.numel() + 2 * GUARD, dtype=like.dtype, device=like.device))
    return room[GUARD : GUARD + like.numel()].view(like.shape), room


def bands_intact(room: Tensor) -> bool:
    """Whether nothing was written outside the tensor that `guarded` returned."""
    bands = torch.cat([room[:GUARD], room[-GUARD:]])
    return bool(bands.isnan().all() if room.is_floating_point() else (bands == torch.iinfo(room.dtype).min).all())


def clone(value: Any, dtype: torch.dtype | None = None, offset: int = OFFSET) -> Any:
    """Copies of all tensors in `value` (lists included), `offset` elements off any alignment; floating ones in another
    dtype if asked."""
    if isinstance(value, (list, tuple)):
        return type(value)(clone(v, dtype, offset) for v in value)
    if not isinstance(value, Tensor):
        return value
    dtype = dtype if dtype and value.is_floating_point() else value.dtype
    room = torch.empty(value.numel() + offset, dtype=dtype, device=value.device)
    return room[offset:].view(value.shape).copy_(value)


def check_op(
    op: Op, backend: str, case: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0, offset: int = OFFSET
) -> Outcome:
    """Hold one back end of one op to its contract on one case, with inputs `offset` elements off any alignment."""
    args, truth, own = expected(op.name, case, dtype, device, seed)
    results = []
    for _ in range(2):
        given = clone(args, offset=offset)
        rooms = [guarded(t) for t in as_tuple(op.empty(op.checked(*given)))]
        out = tuple(tensor for tensor, _ in rooms)
        with registry.use_backend(backend):
            op(*given, out=out if len(out) > 1 else out[0])
        if not all(bands_intact(room) for _, room in rooms):
            return Outcome(op.name, backend, case, dtype, "wrote outside its result", 0.0, 0.0, 0.0)
        results.append([*out, *_mutated(op, given)])
    same = all(torch.equal(_bits(a), _bits(b)) for a, b in zip(*results, strict=True))
    complaint = None if same else "two calls gave different bits"
    worst = (0.0, 0.0, 1.0)
    for value, right, reference in zip(results[0], truth, own, strict=True):
        if not value.is_floating_point():
            if not torch.equal(value, right):
                judge = op.verdict or (lambda _, value, truth: f"{value.tolist()} instead of {truth.tolist()}")
                complaint = complaint or judge(op.checked(*args), value, right)
            continue
        tolerance = (op.tolerance or {}).get(dtype) or ONE_ROUNDING[value.dtype]
        defined = ~right.isnan()  # a cache's unused part holds NaN, and must go on holding it
        if not torch.equal(value.isnan(), ~defined):
            complaint = complaint or "NaN where there should be none, or none where there was one"
        errors = [
            rel_error(torch.where(defined, t.double(), 0.0), torch.where(defined, right, 0.0))
            for t in (value, reference)
        ]
        if max(errors) > tolerance:
            complaint = (
                complaint or f"relative error {errors[0]:.1e} (reference {errors[1]:.1e}), allowed {tolerance:.0e}"
            )
        worst = max(worst, (errors[0], errors[1], tolerance), key=lambda w: w[0] / w[2])
    return Outcome(op.name, backend, case, dtype, complaint, *worst)


@lru_cache(maxsize=2)
def expected(
    op_name: str, case: str, dtype: torch.dtype, device: str, seed: int
) -> tuple[tuple, list[Tensor], list[Tensor]]:
    """A case's arguments, and what the reference makes of them in float64 (the truth) and in the case's own dtype."""
    op = registry.OPS[op_name]
    args = op.inputs(Make(dtype, device, seed), **op.cases[case])

    def run(given: tuple) -> list[Tensor]:
        return [*as_tuple(op.reference(*given)), *_mutated(op, given)]

    return args, run(clone(args, torch.float64)), run(clone(args))


def contract_cases(device: str = "cpu") -> Iterator[tuple[Op, str, str, torch.dtype]]:
    """Every (op, back end, case, dtype) that the machine's back ends should pass on a device."""
    for op in registry.OPS.values():
        backends = [impl.backend for impl in registry.candidates(op.name, device)]
        yield from itertools.product((op,), backends, op.cases, DTYPES)


def _mutated(op: Op, args: tuple) -> list[Tensor]:
    """The arguments that the op writes besides its result: its caches."""
    named = zip(op.parameters, args, strict=True)
    return [
        t
        for name, value in named
        if name.endswith(("_cache", "_caches"))
        for t in as_tuple(value)
        if isinstance(t, Tensor)
    ]


def _bits(tensor: Tensor) -> Tensor:
    sized = {4: torch.int32, 2: torch.int16, 8: torch.int64}
    return tensor.contiguous().view(sized[tensor.element_size()])
