"""One frame after 0, 512, 2048 and 8192 positions, by every system.

pytest bench/bench_context.py --benchmark-json context.json

All systems go on from the same past; one whose logits are not as near to float64 as they should be is not timed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s1kernels.bench import models
from s1kernels.bench.systems import Frames, System, systems
from s1kernels.cli import gpu

FRAMES = {"cpu": 4, "cuda": 32}  # of a round
EXPORTED = 1024  # positions of exported caches
CONTEXTS = {False: (0, 512, 2048, 8192), True: (0, 8)}  # --small


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    every = list(systems(torch.device(config.getoption("--device"))))
    metafunc.parametrize("context", CONTEXTS[config.getoption("--small")])  # the last is the outermost
    metafunc.parametrize("system", every, ids=[system.name.replace(" ", "_") for system in every], scope="module")


@pytest.fixture(scope="module")
def frames(pytestconfig: pytest.Config, device: torch.device, dtype: torch.dtype, ceiling: float) -> Frames:
    small = pytestconfig.getoption("--small")
    count, contexts = FRAMES[device.type], CONTEXTS[small]
    shape = models.config(small, max(EXPORTED, -(-(max(contexts) + count + 8) // 512) * 512))
    given = models.weights(shape, dtype, device)
    return Frames(shape, given, list(contexts), ceiling, EXPORTED, count, count=1, budget=0.0)


def test_context(system: System, context: int, frames: Frames, device: torch.device, benchmark: Any) -> None:
    runner, facts = frames.ready(system, context)
    decode = frames.decoder(runner, context, frames.frames)

    def run() -> None:
        decode()
        gpu.synchronize(device)

    benchmark.group = f"a frame after {context} positions"
    benchmark.pedantic(run, rounds=5, warmup_rounds=0)
    row = {"seconds": benchmark.stats.stats.median / frames.frames}
    benchmark.extra_info.update(
        system=system.name, context=context, frames=frames.frames, **row, **frames.rates(row, context), **facts
    )
