"""Every op at S1-mini's shapes: its back ends, the library's calls and torch.compile side by side, by pytest-benchmark.

pytest bench/bench_ops.py --benchmark-json ops.json

What is not correct is not timed. Arguments rotate over more memory than caches hold, as a model's weights do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s1kernels import registry, testing
from s1kernels.contract import Op, as_tuple

ROTATED = {"cuda": 256 << 20, "cpu": 128 << 20}
"""Bytes that the arguments rotate over: more than any L2 cache, and than most last-level caches."""
MOST_COPIES = 64
LOOSER = 4
"""A library's call may be so many times farther from float64 than the op's contract allows: it rounds in between."""


@dataclass(frozen=True)
class Contender:
    """A way to compute an op. `call` takes its arguments and `out`."""

    op: Op
    name: str
    call: Callable[..., Any]
    ours: bool


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
    "swiglu": lambda gate, up, out: out.copy_(F.silu(gate) * up),
}
"""The best calls of torch for an op; those that are missing have none."""


def contenders(op: Op, device: str, compiled: bool) -> list[Contender]:
    """All that can compute an op on a device."""
    names = [name for name in op.impls if name != "reference" and _serves(name, device)]
    found = [Contender(op, name, op.impls[name].run, True) for name in names]
    found.append(Contender(op, "eager", op.impls["reference"].run, True))
    if op.name in LIBRARY:
        found.append(Contender(op, "library", LIBRARY[op.name], False))
    if compiled:
        reference = torch.compile(op.reference, dynamic=False)

        def run(*args: Any) -> None:
            for to, value in zip(as_tuple(args[-1]), as_tuple(reference(*args[:-1])), strict=True):
                to.copy_(value)

        found.append(Contender(op, "compiled", run, False))
    return found


def _serves(backend: str, device: str) -> bool:
    """Whether a back end is usable and for this device. Triton's interpreter is no contender."""
    return device == ("cpu" if backend == "cpu" else "cuda") and registry.BACKENDS[backend]() is None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device, every = torch.device(config.getoption("--device")).type, config.getoption("--every-case")
    found = [
        pytest.param(contender, case, id=f"{op.name}-{case}-{contender.name}")
        for op in registry.OPS.values()
        if op.name != "decode_frame"  # bench_frame.py
        for case in op.cases
        if every or case.startswith("s1") or not any(name.startswith("s1") for name in op.cases)
        for contender in contenders(op, device, config.getoption("--compiled"))
    ]
    metafunc.parametrize(("contender", "case"), found)


def test_op(
    contender: Contender, case: str, device: torch.device, dtype: torch.dtype, ceiling: float, benchmark: Any
) -> None:
    op = contender.op
    error = gate(contender, case, dtype, device)
    args = op.inputs(testing.Make(dtype, str(device), offset=0), **op.cases[case])
    moved = op.bytes_moved(op.checked(*args))
    copies = rotation(op, args, moved, ROTATED[device.type])
    run = replay(contender, copies) if device.type == "cuda" else lambda: [contender.call(*c) for c in copies]
    benchmark.group = f"{op.name} {case} {str(dtype).removeprefix('torch.')}"
    benchmark.pedantic(run, rounds=15, warmup_rounds=2)
    seconds = benchmark.stats.stats.median / len(copies)
    rate = moved / seconds / 1e9
    benchmark.extra_info.update(
        op=op.name, case=case, contender=contender.name, dtype=str(dtype), bytes=moved, copies=len(copies),
        microseconds=seconds * 1e6, gigabytes_per_second=rate, percent_of_read_bandwidth=100 * rate / ceiling,
        error=error,
    )  # fmt: skip


def gate(contender: Contender, case: str, dtype: torch.dtype, device: torch.device) -> float:
    """The contender's relative error against float64; fails the bench if it is more than allowed."""
    op = contender.op
    if contender.ours:
        name = "reference" if contender.name == "eager" else contender.name
        outcome = testing.check_op(op, name, case, dtype, str(device), offset=0)
        if outcome.complaint:
            pytest.fail(f"refused, for it is wrong: {outcome}")
        return outcome.error
    args, truth, _ = testing.expected(op.name, case, dtype, str(device), 0)
    given = testing.clone(args)
    out = op.empty(op.checked(*given))
    contender.call(*given, out)
    worst = 0.0
    for value, right in zip(as_tuple(out), truth, strict=False):
        allowed = LOOSER * ((op.tolerance or {}).get(dtype) or testing.ONE_ROUNDING[dtype])
        error = testing.rel_error(value, right)
        if not error <= allowed:
            pytest.fail(f"refused, for it is wrong: relative error {error:.1e}, allowed {allowed:.0e}")
        worst = max(worst, error)
    return worst


def rotation(op: Op, args: tuple, moved: int, total: int) -> list[tuple]:
    """Copies of a call's arguments, each with a result of its own, that move `total` bytes together."""
    count = min(MOST_COPIES, max(1, -(-total // max(moved, 1))))
    copies = [testing.clone(args, offset=0) for _ in range(count)]
    return [(*given, op.empty(op.checked(*given))) for given in copies]


def replay(contender: Contender, copies: list[tuple]) -> Callable[[], None]:
    """All calls as one CUDA graph, so that the host's share of a launch does not count."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for given in copies[:2]:
            contender.call(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for given in copies:
                contender.call(*given)
    except RuntimeError as error:  # it looks at the GPU from the host, as some references do
        pytest.skip(f"it cannot be captured: {str(error).splitlines()[0]}")

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run
