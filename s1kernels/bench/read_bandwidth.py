"""How fast this machine's memory is read: the best of torch's own reductions over a tensor larger than any cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SIZE = {"cuda": 4 << 30, "cpu": 256 << 20}  # bytes
REPEATS = 10
COLUMNS = 4096

READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum, float32": lambda x, v: x.sum(),
    "sum, bfloat16": lambda x, v: x.view(torch.bfloat16).sum(),
    "sum of rows, float32": lambda x, v: x.view(-1, COLUMNS).sum(1),
    "maximum, float32": lambda x, v: x.amax(),
    "norm, float32": lambda x, v: torch.linalg.vector_norm(x),
    "matrix times vector, bfloat16": lambda x, v: x.view(torch.bfloat16).view(-1, COLUMNS) @ v,
}


def measure(device: torch.device) -> dict[str, Any]:
    """GB/s by reduction (median of ten; by events on a GPU), and the best of them."""
    size = SIZE.get(device.type, SIZE["cpu"])
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 2 // (1 << 20) * (1 << 20))
    x = torch.empty(size // 4, device=device).uniform_()
    v = torch.ones(COLUMNS, device=device, dtype=torch.bfloat16)
    rates = {}
    for name, read in READS.items():
        read(x, v)
        rates[name] = size / statistics.median(_seconds(read, x, v) for _ in range(REPEATS)) / 1e9
    best = max(rates, key=lambda name: rates[name])
    return {"gigabytes_per_second": rates[best], "by": best, "bytes": size, "all": rates}


def _seconds(read: Callable[[Tensor, Tensor], Tensor], x: Tensor, v: Tensor) -> float:
    if x.device.type != "cuda":
        start = time.perf_counter()
        read(x, v)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    read(x, v)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
