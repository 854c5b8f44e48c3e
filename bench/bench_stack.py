"""Plain transformer stacks of the sizes that the project began with: torch, CUDA graph, ONNX Runtime and s1kernels.

pytest bench/bench_stack.py --benchmark-json stack.json

All positions at once ("sequence"), and one more behind the others ("step"). What is not correct is not timed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from s1kernels.bench.stack import MODES, SIZES, SYSTEMS, Size, Stack, describe
from s1kernels.bench.timing import Refused
from s1kernels.cli import gpu


@lru_cache(maxsize=1)
def stack(size: Size, mode: str, dtype: torch.dtype, device: torch.device) -> Stack:
    return Stack(size, mode, dtype, device)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stack(
    size: Size, mode: str, system: str, device: torch.device, dtype: torch.dtype, pytestconfig: pytest.Config,
    benchmark: Any,
) -> None:  # fmt: skip
    if system == "torch.compile" and not pytestconfig.getoption("--compiled"):
        raise Refused("left out; pass --compiled")
    made = stack(size, mode, dtype, device)
    call, facts = made.ready(system)

    def run() -> None:
        call()
        gpu.synchronize(device)

    benchmark.group = f"{size} {mode}"
    benchmark.pedantic(run, rounds=15, warmup_rounds=3)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        describe(size, mode, system), **facts, microseconds=seconds * 1e6,
        positions_per_second=made.x.shape[0] / seconds,
    )  # fmt: skip
