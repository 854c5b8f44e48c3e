"""Texts of several lengths spoken: frames, seconds of audio, generation time, real-time factor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from s1kernels.bench import timing
from s1kernels.bench.runners import Runner, seed_for
from s1kernels.cli.demo import FRAMES_PER_SECOND

CHARACTERS = (12, 44, 233, 512)
CHARACTERS_PER_SECOND = 15  # of English read aloud, some 150 words a minute
CHARACTERS_PER_TOKEN = 4
REFERENCE_FRAMES = 128  # of the voice that is imitated, which stand in the prompt
TOKENS_PER_FRAME = 4
"""How the tokens a second of the project's first table count: 46.6 of them were 0.54 times real time."""


def lengths(characters: int) -> tuple[int, int]:
    """Frames of the prompt, and frames of the speech, of a text."""
    seconds = characters / CHARACTERS_PER_SECOND
    return REFERENCE_FRAMES + -(-characters // CHARACTERS_PER_TOKEN), math.ceil(seconds * FRAMES_PER_SECOND)


def speaker(runner: Runner, text: Tensor, characters: int) -> Callable[[], None]:
    """What speaks a text of so many characters: reads the prompt, decodes the frames. It has run once.

    Args:
        runner: made for a cache that holds prompt and speech.
        text: [N+1, P] frames, of which the first are the prompt.
    Raises:
        Refused: the end token comes too early.
    """
    prompt, frames = lengths(characters)
    last = text[:, prompt - 1 : prompt]
    runner.prefill(text[:, : prompt - 1])
    seed = seed_for(runner, frames, last, prompt - 1)

    def speak() -> None:
        runner.prefill(text[:, : prompt - 1])
        runner.decode(last, prompt - 1, frames, seed)

    return speak


def rates(row: dict[str, Any], characters: int) -> dict[str, Any]:
    """What a row's seconds mean."""
    prompt, frames = lengths(characters)
    audio = frames / FRAMES_PER_SECOND
    return {
        "characters": characters, "prompt": prompt, "frames": frames, "audio_seconds": audio,
        "real_time_factor": row["seconds"] / audio, "times_real_time": audio / row["seconds"],
        "tokens_per_second": TOKENS_PER_FRAME * frames / row["seconds"],
    }  # fmt: skip


def measure(runner: Runner, text: Tensor, characters: int, count: int, budget: float) -> dict[str, Any]:
    """A text's row, of `count` times, or of two if they take `budget` seconds. Arguments as of `speaker`."""
    taken = timing.rounds(speaker(runner, text, characters), count, text.device, warm_up=0, budget=budget)
    row = timing.summary(taken)
    return row | rates(row, characters) | runner.facts
