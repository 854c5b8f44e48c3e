"""Texts of 12, 44, 233 and 512 characters: frames, seconds of audio, generation time, real-time factor, tokens/s.

pytest bench/bench_rtf.py --benchmark-json rtf.json

What characters mean in frames, and what a token is, says s1kernels/bench/speech.py. Frames end at their codes here:
bench_speech.py times the same texts from text to sound, with the codec's share.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s1kernels.bench import models, speech, timing
from s1kernels.bench.runners import Model
from s1kernels.bench.systems import Frames, System, systems
from s1kernels.cli import gpu

EXPORTED = "its exported step would read the prompt frame by frame"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = list(systems(torch.device(metafunc.config.getoption("--device"))))
    metafunc.parametrize("characters", speech.CHARACTERS[: 1 if metafunc.config.getoption("--small") else None])
    metafunc.parametrize("system", every, ids=[system.name.replace(" ", "_") for system in every], scope="module")


@pytest.fixture(scope="module")
def frames(pytestconfig: pytest.Config, device: torch.device, dtype: torch.dtype, ceiling: float) -> Frames:
    """The model, and the truth that systems are held to before they speak."""
    most = max(sum(speech.lengths(characters)) for characters in speech.CHARACTERS)
    shape = models.config(pytestconfig.getoption("--small"), -(-most // 512) * 512)
    return Frames(shape, models.weights(shape, dtype, device), [64], ceiling, 0, 8, count=1, budget=0.0)


def test_text(system: System, characters: int, frames: Frames, device: torch.device, benchmark: Any) -> None:
    if system.exported and system.refusal(device) is None:
        raise timing.Refused(EXPORTED)
    _, facts = frames.ready(system, 64)
    total = sum(speech.lengths(characters))
    runner = system.make(Model(frames.shape, frames.given, -(-total // 512) * 512))
    speak = speech.speaker(runner, models.prompt(frames.shape, total, device), characters)

    def run() -> None:
        speak()
        gpu.synchronize(device)

    benchmark.group = f"{characters} characters"
    benchmark.pedantic(run, rounds=3, warmup_rounds=0)
    row = {"seconds": benchmark.stats.stats.median}
    benchmark.extra_info.update(system=system.name, **row, **speech.rates(row, characters), **facts)
