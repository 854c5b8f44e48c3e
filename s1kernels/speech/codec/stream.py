"""Decodes chunk by chunk: `Stream`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s1kernels.speech.codec.layers import Past

if TYPE_CHECKING:
    from s1kernels.speech.codec.codec import Codec

FRAMES = 64
"""Frames that are decoded or encoded at once, so that long audio takes no more memory than these."""

View = tuple[Tensor, Tensor]


class Stream:
    """Decodes codes as they come. What it returns, joined, is `Codec.decode` of all codes, whatever the chunks are:
    every layer is causal, so that there is nothing to wait for and nothing left at the end. Its memory stays the same
    however long it runs. On a GPU all calls belong into one CUDA stream.
    """

    @torch.inference_mode()
    def __init__(self, codec: Codec, chunks: Sequence[int] = ()) -> None:
        if not all(type(size) is int and 1 <= size <= FRAMES for size in chunks):
            raise ValueError(f"codec: chunks must be from 1 to {FRAMES} frames, got {list(chunks)}; choose others")
        self._codec, self._past, self._frames = codec, Past(), 0
        sizes = sorted(set(chunks)) if codec.device.type == "cuda" else []
        self._graphs = {size: Graph(codec, size, self._past) for size in sizes}

    @torch.inference_mode()
    def push(self, codes: Tensor) -> Tensor:
        """The audio of the next frames.

        Args:
            codes: [N, n] int32 or int64, n >= 1. On a GPU their check waits for them; on the CPU it does not.
        Returns:
            [n * frame_samples] float32, on the codec's device.
        Raises:
            ValueError, TypeError: as `Codec.decode`; the stream is as before.
        """
        self._codec.check_codes(codes)
        return torch.cat([self._decode(part) for part in codes.split(FRAMES, dim=1)])

    @torch.inference_mode()
    def reset(self) -> None:
        """Begin anew; CUDA graphs stay."""
        self._past.clear()
        self._frames = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the stream keeps from one chunk to the next."""
        return self._past.nbytes

    def _decode(self, codes: Tensor) -> Tensor:
        count = codes.shape[1]
        view = self._codec.decoder.transformer.view(self._frames, count)
        graph = self._graphs.get(count)
        audio = graph.replay(codes, view) if graph else decode(self._codec, codes, self._past, view)
        self._frames += count
        return audio


class Graph:
    """The decoder of so many frames as a CUDA graph. What goes in is copied to where the graph reads it; its past lies
    where that of other chunks lies."""

    def __init__(self, codec: Codec, frames: int, past: Past) -> None:
        view = codec.decoder.transformer.view(0, frames)
        self._codes = torch.zeros(codec.codebooks, frames, dtype=torch.int64, device=codec.device)
        self._view = view[0].to(codec.device), view[1].to(codec.device)
        rehearsal = Past()
        with torch.cuda.device(codec.device):
            decode(codec, self._codes, rehearsal, self._view)  # compiles and loads the kernels
            past.allocate(rehearsal)
            self._graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(codec.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._audio = decode(codec, self._codes, past, self._view)
                finally:
                    self._graph.capture_end()
            torch.cuda.current_stream().wait_stream(side)

    def replay(self, codes: Tensor, view: View) -> Tensor:
        with torch.cuda.device(self._codes.device):
            for buffer, value in zip((self._codes, *self._view), (codes, *view), strict=True):
                buffer.copy_(value, non_blocking=True)
            self._graph.replay()
            return self._audio.clone()


def decode(codec: Codec, codes: Tensor, past: Past, view: View) -> Tensor:
    """[N, n] codes behind `past` -> [n * frame_samples]."""
    vectors = codec.quantizers.vectors(codes.to(codec.device, torch.int64))
    return codec.decoder(vectors.to(codec.dtype), past, view)[0, 0]
