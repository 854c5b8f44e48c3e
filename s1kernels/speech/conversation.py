"""A text spoken part after part, each after what was said before."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s1kernels.engine import Engine
from s1kernels.sampling import Sampling
from s1kernels.speech.prompt import Prompt
from s1kernels.speech.text import usual_seconds

if TYPE_CHECKING:
    from s1kernels.speech.audio import Audio

LOOP_SECONDS, LOOP_TOKENS = 6.0, 3
"""So long with no more than so many different tokens is no speech, and no pause either."""

HASTE = 4  # speech that is so many times shorter than usual has left something out

logger = logging.getLogger("s1kernels")


class IncompleteSpeech(RuntimeError):
    """The model did not speak a text to its end: it came to none, or to one at once, or went round in circles.

    What it said until then is kept.

    text: the part that was being spoken. audio: all that was spoken, if `say` raised it; `stream` had handed it out.
    """

    def __init__(self, text: str, what: str) -> None:
        self.text = text
        self.audio: Audio | None = None
        super().__init__(
            f"speech: the model must speak a text to its end, got {what} in {text[:60]!r}; what was spoken is kept: "
            "try another seed, a lower temperature or a clearer reference"
        )


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a text: `turn` [N+1, T] is how it is asked for, `frames` are the most that it may take."""

    text: str
    turn: Tensor
    frames: int


class Conversation:
    """What a model has read and said, which its cache keeps from part to part while there is room.

    Args:
        engine: decodes; nothing else may use it meanwhile. prompt: lays out for it.
        opening: [N+1, T] frames that come first. frame_rate: frames a second.
    """

    def __init__(self, engine: Engine, prompt: Prompt, opening: Tensor, frame_rate: float) -> None:
        self.engine, self.prompt, self.opening, self.frame_rate = engine, prompt, opening, frame_rate
        self._start, self._unread = 0, opening  # the first position that is free, and what is to be read there
        self._last = opening[:, :0]  # the part before, with its speech

    def speak(self, part: Part, sampling: Sampling, generator: torch.Generator | None) -> Iterator[Tensor]:
        """The codes [N] of a part, frame by frame. Raises IncompleteSpeech, after the last of them."""
        end_token = self.engine.config.end_token
        prompt = self._make_room(part)
        said: list[Tensor] = []
        recent: deque[int] = deque(maxlen=math.ceil(LOOP_SECONDS * self.frame_rate))
        for frame in self.engine.stream(prompt, part.frames, sampling, generator=generator, start=self._start):
            if int(frame[0]) == end_token:
                self._start += prompt.shape[1] + len(said)
                self._unread = torch.cat([frame[:, None].to(torch.int32), self.prompt.closing()], dim=1)
                if not said:
                    raise IncompleteSpeech(part.text, "no speech at all")
                if (seconds := len(said) / self.frame_rate) < usual_seconds(part.text) / HASTE:
                    logger.warning("%.1f s are little for %r: were words left out?", seconds, part.text[:60])
                self._last = self.prompt.spoken(part.text, torch.stack(said, dim=1))
                return
            said.append(frame[1:])
            recent.append(int(frame[0]))
            yield said[-1]
            if len(recent) == recent.maxlen and len(set(recent)) <= LOOP_TOKENS:
                raise IncompleteSpeech(part.text, f"the same sound for {LOOP_SECONDS:g} s")
        raise IncompleteSpeech(part.text, f"no end within {part.frames / self.frame_rate:.1f} s")

    def _make_room(self, part: Part) -> Tensor:
        """The prompt of a part. Where the context is full, a new one starts with the part before alone."""
        most = self.engine.config.max_positions - part.frames
        prompt = torch.cat([self._unread, part.turn], dim=1)
        if self._start + prompt.shape[1] > most:
            self._start = 0
            prompt = torch.cat([self.opening, self._last, part.turn], dim=1)
        if prompt.shape[1] > most:
            prompt = torch.cat([self.opening, part.turn], dim=1)
        self.engine.cache.reserve(self._start + prompt.shape[1] + part.frames)  # it grows now, not amid the speech
        return prompt
