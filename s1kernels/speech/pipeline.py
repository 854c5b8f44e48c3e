"""Codes to sound while the next codes are decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

CHUNKS = (4, 8, 16, 25)
"""Frames that the codec gets at a time: few at first, so that sound comes soon, then more. The last one is repeated."""


class CodecStream(Protocol):
    """A codec's state between chunks."""

    def push(self, codes: Tensor) -> Tensor:
        """Codes [N, n] int64 on the host -> their samples [n * frame_samples] float32, on the codec's device."""
        ...

    def reset(self) -> None:
        """Begin anew."""
        ...


class Codec(Protocol):
    """What turns codes into sound and back."""

    sample_rate: int  # Hz
    frame_samples: int  # samples that a frame's codes become

    @property
    def codebook_sizes(self) -> Sequence[int]:
        """Codes of each of the N codebooks."""
        ...

    def encode(self, audio: np.ndarray, sample_rate: int) -> Tensor:
        """Samples [S] -> codes [N, T]."""
        ...

    def stream(self, chunks: Sequence[int] = ()) -> CodecStream:
        """A new stream, fast for chunks of these sizes. What it makes of chunks, joined, is what it makes of all."""
        ...


class Sound:
    """A chunk of samples that is on its way to the host."""

    def __init__(self, codes: Tensor, samples: Tensor) -> None:
        self.codes, self._samples = codes, samples
        self._arrived: torch.cuda.Event | None = None
        if samples.is_cuda:
            self._samples = torch.empty(samples.shape, dtype=samples.dtype, pin_memory=True)
            self._samples.copy_(samples, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def ready(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def samples(self) -> np.ndarray:
        """[S] float32. Waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._samples.numpy().copy()


class Pipeline:
    """Makes sound of frames while they are decoded.

    Args:
        codec: makes it; CUDA graphs of its chunks are captured now.
        device: the model's and the codec's.
        beside: on a GPU, let the codec work while the next frames are decoded, in a stream of its own (`side`); else it
            works in between, in the same one.
    """

    def __init__(self, codec: Codec, device: torch.device, beside: bool) -> None:
        self.side = torch.cuda.Stream(device) if device.type == "cuda" and beside else None
        self._device, self._last = device, torch.tensor(codec.codebook_sizes)[:, None] - 1
        with self._placed():
            self._stream = codec.stream(CHUNKS)

    def sounds(self, frames: Iterable[Tensor]) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Codes [N, n] and their samples [n * frame_samples] float32, chunk by chunk.

        Codes that a codebook does not have are spoken as its last one, as upstream does.

        Args:
            frames: codes [N] each, in host memory. An error in them is raised after the sound of those before it.
        """
        with self._placed():
            self._stream.reset()
        sizes = chain(CHUNKS, repeat(CHUNKS[-1]))
        size, error = next(sizes), None
        waiting: list[Tensor] = []
        working: deque[Sound] = deque()
        try:
            for frame in frames:
                waiting.append(frame)
                if len(waiting) == size:
                    chunk, waiting, size = waiting, [], next(sizes)
                    working.append(self._push(chunk))
                while working and working[0].ready():
                    sound = working.popleft()
                    yield sound.codes, sound.samples()
        except Exception as raised:
            error = raised
        if waiting:
            working.append(self._push(waiting))
        for sound in working:
            yield sound.codes, sound.samples()
        if error is not None:
            raise error

    def _push(self, frames: list[Tensor]) -> Sound:
        codes = torch.stack(frames, dim=1)
        known = torch.minimum(codes.long(), self._last)
        with self._placed():
            return Sound(codes, self._stream.push(known.pin_memory() if self._device.type == "cuda" else known))

    @contextmanager
    def _placed(self) -> Iterator[None]:
        """Work where the codec does."""
        with torch.inference_mode():
            if self._device.type != "cuda":
                yield
                return
            with torch.cuda.device(self._device), torch.cuda.stream(self.side):
                yield
