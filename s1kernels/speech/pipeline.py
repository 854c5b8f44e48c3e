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

    def stream(self) -> CodecStream:
        """A new stream: what it makes of chunks, joined, is what it makes of the whole."""
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


def sounds(
    frames: Iterable[Tensor], codec: Codec, device: torch.device, side: torch.cuda.Stream | None = None
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Codes and samples, chunk by chunk, of frames as they are decoded.

    Codes that a codebook does not have are spoken as its last one, as upstream does.

    Args:
        frames: codes [N] each, in host memory. An error in them is raised after the sound of those before it.
        device: the model's and the codec's.
        side: on a GPU, the stream in which the codec works while the next frames are decoded in the current one; None
            lets it work in between.
    Yields:
        Codes [N, n] and samples [n * frame_samples] float32, in order.
    """
    stream, sizes = codec.stream(), chain(CHUNKS, repeat(CHUNKS[-1]))
    size, last = next(sizes), torch.tensor(codec.codebook_sizes)[:, None] - 1
    waiting: list[Tensor] = []
    working: deque[Sound] = deque()
    error: Exception | None = None

    def push() -> None:
        codes = torch.stack(waiting, dim=1)
        waiting.clear()
        with torch.inference_mode(), _on(device, side):
            known = torch.minimum(codes.long(), last)
            working.append(Sound(codes, stream.push(known.pin_memory() if device.type == "cuda" else known)))

    try:
        for frame in frames:
            waiting.append(frame)
            if len(waiting) == size:
                push()
                size = next(sizes)
            while working and working[0].ready():
                sound = working.popleft()
                yield sound.codes, sound.samples()
    except Exception as raised:
        error = raised
    if waiting:
        push()
    for sound in working:
        yield sound.codes, sound.samples()
    if error is not None:
        raise error


@contextmanager
def _on(device: torch.device, side: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on a device, on a GPU in the stream `side`, or in the current one if it is None."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(side):
        yield
