"""Each op's contenders: our back ends, the reference, torch's own best calls; checked, then timed over much memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s1kernels import registry, testing
from s1kernels.bench import timing
from s1kernels.bench.timing import Refused, Wrong
from s1kernels.cli import gpu
from s1kernels.contract import Op, as_tuple
from s1kernels.model import torch_ops

ROTATED = {"cuda": 256 << 20, "cpu": 128 << 20}
"""Bytes that the arguments rotate over: more than any L2 cache, and than most last-level caches."""
MOST_COPIES, MOST_COPIED = 64, 1 << 30  # calls, bytes
REPLAYS = 8  # of a CUDA graph in a row, beside which waiting for the GPU takes no time
LOOSER = 4
"""A library's call may be so many times farther from float64 than the op's contract allows: it rounds in between."""


@dataclass(frozen=True)
class Contender:
    """A way to compute an op. `call` takes its arguments, as `prepare` leaves them, and `out`."""

    op: Op
    name: str
    call: Callable[..., Any]
    ours: bool
    prepare: Callable[[tuple], tuple] = tuple


def _attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, out: Tensor) -> None:
    T = q.shape[0] // k_cache.shape[0]
    for b, n in enumerate(length.tolist()):  # as a caller with a growing cache has it on the host
        k, v = k_cache[b // T, None, :, :n], v_cache[b // T, None, :, :n]
        out[b] = F.scaled_dot_product_attention(q[None, b, :, None], k, v, enable_gqa=True)[0, :, 0]


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _logits(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, out: tuple[Tensor, Tensor]) -> None:
    normed = _normed(x, norm_weight, eps)
    out[0].copy_(F.linear(normed, weight))
    out[1].copy_(normed)


def _snake(
    x: Tensor, bias: Tensor | None, alpha: Tensor | None, past_cache: Tensor, turn: Tensor, taps: int, dilation: int,
    stride: int, out: Tensor,
) -> None:  # fmt: skip
    y = x if bias is None else x + bias
    if alpha is not None:
        y = y + torch.sin(alpha * y).square() / (alpha + 1e-9)
    half = turn.long() & 1
    a = torch.cat((past_cache.index_select(0, half)[0], y))
    past_cache.index_copy_(0, 1 - half, a[None, x.shape[0] :])
    windows = a.unfold(0, (taps - 1) * dilation + 1, stride)[..., ::dilation].transpose(1, 2)
    out.view(windows.shape).copy_(windows)


LIBRARY: dict[str, Callable[..., Any]] = {
    "attention_decode": _attention,
    "linear_residual": lambda x, w, bias, residual, out: out.copy_(
        F.linear(x, w, bias) if residual is None else F.linear(x, w, bias) + residual
    ),
    "rms_norm": lambda x, weight, eps, out: out.copy_(_normed(x, weight, eps)),
    "rms_norm_logits": _logits,
    "rms_norm_qkv": lambda x, norm, w, bias, eps, out: out.copy_(F.linear(_normed(x, norm, eps), w, bias)),
    "rms_norm_swiglu": lambda x, norm, w1, w3, eps, out: out.copy_(
        F.silu(F.linear(_normed(x, norm, eps), w1)) * F.linear(_normed(x, norm, eps), w3)
    ),
    "snake": _snake,
    "swiglu": lambda gate, up, out: out.copy_(F.silu(gate) * up),
}
"""The best calls of torch for an op; those that are missing have none."""


def _length_on_host(args: tuple) -> tuple:
    """Arguments of attention_decode, whose caller knows the length."""
    return (*args[:3], args[3].cpu())


def _finite(args: tuple) -> tuple:
    """Arguments whose caches hold numbers past what is used too; plain torch calls are for one sequence."""
    if any(isinstance(t, Tensor) and t.dim() == 4 and t.shape[0] != 1 for t in args):
        raise Refused("plain torch calls take one sequence")
    return tuple(t.nan_to_num() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args)


def _compiled(op: Op) -> Contender:
    """What torch.compile makes of the op in plain torch calls that do not look at the GPU from the host."""
    from torch._dynamo.exc import TorchDynamoException  # takes long to import

    plain = torch.compile(getattr(torch_ops, op.name, op.reference), dynamic=False, fullgraph=True)

    def run(*args: Any) -> None:
        try:
            values = plain(*args[:-1])
        except TorchDynamoException as error:
            raise Refused(f"torch.compile cannot: {error}") from error
        for to, value in zip(as_tuple(args[-1]), as_tuple(values), strict=True):
            to.copy_(value)

    return Contender(op, "compiled", run, False, _finite)


def contenders(op: Op, device: str, compiled: bool = False) -> list[Contender]:
    """All that can compute an op on a device."""
    names = [name for name in op.impls if name != "reference" and _serves(name, device)]
    found = [Contender(op, name, op.impls[name].run, True) for name in names]
    found.append(Contender(op, "eager", op.impls["reference"].run, True))
    if op.name in LIBRARY:
        prepare = _length_on_host if op.name == "attention_decode" else tuple
        found.append(Contender(op, "library", LIBRARY[op.name], False, prepare))
    if compiled:
        found.append(_compiled(op))
    return found


def cases(every: bool = False) -> Iterator[tuple[Op, str]]:
    """The ops that a frame is made of, at S1-mini's shapes (where a contract has any), or in every case."""
    for op in registry.OPS.values():
        if op.name == "decode_frame":  # a frame has benches of its own
            continue
        shaped = any(name.startswith("s1") for name in op.cases)
        yield from ((op, case) for case in op.cases if every or case.startswith("s1") or not shaped)


def _serves(backend: str, device: str) -> bool:
    """Whether a back end is usable and for this device. Triton's interpreter is no contender."""
    return device == ("cpu" if backend == "cpu" else "cuda") and registry.BACKENDS[backend]() is None


def gate(contender: Contender, case: str, dtype: torch.dtype, device: torch.device) -> float:
    """The contender's relative error against float64. Raises Wrong if it is more than allowed."""
    op = contender.op
    if contender.ours:
        name = "reference" if contender.name == "eager" else contender.name
        outcome = testing.check_op(op, name, case, dtype, str(device), offset=0)
        if outcome.complaint:
            raise Wrong(f"refused, for it is wrong: {outcome}")
        return outcome.error
    args, truth, _ = testing.expected(op.name, case, dtype, str(device), 0)
    given = testing.clone(args, offset=0)  # torch's own kernels fail off alignment
    out = op.empty(op.checked(*given))
    contender.call(*contender.prepare(given), out)
    worst = 0.0
    for value, right in zip(as_tuple(out), truth, strict=False):
        allowed = LOOSER * ((op.tolerance or {}).get(dtype) or testing.ONE_ROUNDING[dtype])
        error = testing.rel_error(value, right)
        if not error <= allowed:
            raise Wrong(f"refused, for it is wrong: relative error {error:.1e}, allowed {allowed:.0e}")
        worst = max(worst, error)
    return worst


@dataclass(frozen=True)
class Rotation:
    """Calls of one op over more memory than caches hold: `run` does `copies` of them, which move `moved` bytes each."""

    run: Callable[[], Any]
    copies: int
    moved: int


def rotate(contender: Contender, case: str, dtype: torch.dtype, device: torch.device) -> Rotation:
    """A contender's calls on a case. Raises Refused if they cannot be captured on a GPU."""
    op = contender.op
    args = op.inputs(testing.Make(dtype, str(device), offset=0), **op.cases[case])
    moved = op.bytes_moved(op.checked(*args))
    copies = rotation(op, args, moved, ROTATED[device.type])
    calls = [(contender.call, (*contender.prepare(given[:-1]), given[-1])) for given in copies]
    if device.type != "cuda":
        return Rotation(repeat(calls), len(calls), moved)
    return Rotation(replay(calls), REPLAYS * len(calls), moved)


def measure(
    contender: Contender, case: str, dtype: torch.dtype, device: torch.device, ceiling: float, count: int
) -> dict[str, Any]:
    """One contender's row on a case: its error and the time of one call, or why it has none."""
    row: dict[str, Any] = {"op": contender.op.name, "case": case, "contender": contender.name, "dtype": str(dtype)[6:]}
    try:
        row["error"] = gate(contender, case, dtype, device)
        rotated = rotate(contender, case, dtype, device)
        row |= timing.summary(timing.rounds(rotated.run, count, device, warm_up=2), per=rotated.copies)
    except Exception as error:  # whatever a contender fails by belongs in its row
        return row | {"refused": timing.why(error)}
    return row | timing.rates(row, rotated.moved, ceiling)


def rotation(op: Op, args: tuple, moved: int, total: int) -> list[tuple]:
    """Copies of a call's arguments, each with a result of its own, that move `total` bytes together."""
    held = sum(t.nbytes for t in tensors_of(args))
    count = max(1, min(MOST_COPIES, -(-total // max(moved, 1)), MOST_COPIED // max(held, 1)))
    copies = [testing.clone(args, offset=0) for _ in range(count)]
    return [(*given, op.empty(op.checked(*given))) for given in copies]


def tensors_of(args: tuple) -> list[Tensor]:
    """Every tensor among the arguments, those in lists too."""
    return [t for value in args for t in as_tuple(value) if isinstance(t, Tensor)]


def repeat(calls: list[tuple[Callable[..., Any], tuple]]) -> Callable[[], None]:
    """All calls, one after another."""

    def run() -> None:
        for call, given in calls:
            call(*given)

    return run


def replay(calls: list[tuple[Callable[..., Any], tuple]]) -> Callable[[], None]:
    """All calls as one CUDA graph, REPLAYS times in a row: the host's share of a launch does not count. Raises Refused
    if they look at the GPU from the host."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            repeat(calls[:1])()
            with gpu.never_waiting():
                repeat(calls[-1:])()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            repeat(calls)()
    except RuntimeError as error:
        raise Refused(f"it cannot be captured: {str(error).splitlines()[0]}") from error

    def run() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    return run
