"""Every op at S1-mini's shapes: its back ends, the library's calls and torch.compile side by side, by pytest-benchmark.

pytest bench/bench_ops.py --benchmark-json ops.json

What is not correct is not timed. Arguments rotate over more memory than caches hold, as a model's weights do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s1kernels.bench import timing
from s1kernels.bench.ops import Contender, cases, contenders, gate, rotate
from s1kernels.cli import gpu


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device, compiled = torch.device(config.getoption("--device")).type, config.getoption("--compiled")
    found = [
        pytest.param(contender, case, id=f"{op.name}-{case}-{contender.name}")
        for op, case in cases(config.getoption("--every-case"))
        for contender in contenders(op, device, compiled)
    ]
    metafunc.parametrize(("contender", "case"), found)


def test_op(
    contender: Contender, case: str, device: torch.device, dtype: torch.dtype, ceiling: float, benchmark: Any
) -> None:
    error = gate(contender, case, dtype, device)
    rotated = rotate(contender, case, dtype, device)

    def run() -> None:
        rotated.run()
        gpu.synchronize(device)

    benchmark.group = f"{contender.op.name} {case} {str(dtype).removeprefix('torch.')}"
    benchmark.pedantic(run, rounds=15, warmup_rounds=2)
    row = {"seconds": benchmark.stats.stats.median / rotated.copies}
    benchmark.extra_info.update(
        op=contender.op.name, case=case, contender=contender.name, dtype=str(dtype), copies=rotated.copies,
        microseconds=row["seconds"] * 1e6, error=error, **timing.rates(row, rotated.moved, ceiling),
    )  # fmt: skip
