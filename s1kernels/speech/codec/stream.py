"""Decodes chunk by chunk: `Stream`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s1kernels.speech.codec.layers import Past, Place
from s1kernels.speech.codec.network import FRAMES

if TYPE_CHECKING:
    from s1kernels.speech.codec.codec import Codec

ALIGNED = 16
"""Bytes that the parts of a chunk's input are aligned to."""


class Stream:
    """Decodes codes as they come. What it returns, joined, is `Codec.decode` of all codes, whatever the chunks are:
    every layer is causal, so that there is nothing to wait for and nothing left at the end. Its memory stays the same
    however long it runs. On a GPU all calls belong into one CUDA stream.
    """

    @torch.inference_mode()
    def __init__(self, codec: Codec, chunks: Sequence[int] = ()) -> None:
        if not all(type(size) is int and 1 <= size <= FRAMES for size in chunks):
            raise ValueError(f"codec: chunks must be from 1 to {FRAMES} frames, got {list(chunks)}; choose others")
        self._codec, self._past, self._frames, self._turn = codec, Past(codec.device), 0, 0
        self._graphs: dict[int, Graph] = {}
        if codec.device.type == "cuda":
            side, pool = torch.cuda.Stream(codec.device), torch.cuda.graph_pool_handle()
            for size in sorted(set(chunks), reverse=True):
                self._graphs[size] = Graph(codec, size, self._past, side, pool)

    @torch.inference_mode()
    def push(self, codes: Tensor) -> Tensor:
        """The audio of the next frames.

        Args:
            codes: [N, n] int32 or int64, n >= 1. Those on a GPU are waited for; others are not.
        Returns:
            [n * frame_samples] float32, on the codec's device.
        Raises:
            ValueError, TypeError: as `Codec.decode`; the stream is as before.
        """
        parts = [self._decode(part) for part in self._codec.known(codes).split(FRAMES, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.inference_mode()
    def reset(self) -> None:
        """Begin anew; CUDA graphs stay."""
        self._past.clear()
        self._frames = self._turn = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the stream keeps from one chunk to the next."""
        return self._past.nbytes

    def _decode(self, codes: Tensor) -> Tensor:
        count = codes.shape[1]
        given = Given(self._codec, count, host=True)
        given.fill(codes, self._frames, self._turn)
        graph = self._graphs.get(count)
        audio = graph.replay(given) if graph else decode(self._codec, given.moved(), self._past)
        self._frames += count
        self._turn ^= 1
        return audio


class Given:
    """What T frames depend on beside the past. All lies in one piece of memory, so that one copy brings it to a GPU.

    room: that memory, bytes; on the codec's device, or on the host, from where it can be copied in the background.
    rows: [T, N] int32, the codes' rows in the quantizers' table. turn: as `Past` has it. place: where the frames are,
    for the decoder's transformer.
    """

    def __init__(self, codec: Codec, frames: int, room: Tensor | None = None, *, host: bool = False) -> None:
        """room: one that was made for as many frames, or None for a new one."""
        transformer, ints = codec.decoder.transformer, torch.int32
        parts = [
            ((frames, transformer.capacity), codec.dtype),
            ((transformer.capacity, transformer.head_dim // 2, 2), codec.dtype),
            ((frames,), ints),
            ((frames, codec.codebooks), ints),
            ((1,), ints),
        ]
        occupied = [prod(shape) * dtype.itemsize for shape, dtype in parts]
        aligned = [-(-size // ALIGNED) * ALIGNED for size in occupied]
        if room is None:
            device, pinned = torch.device("cpu") if host else codec.device, host and codec.device.type == "cuda"
            room = torch.zeros(sum(aligned), dtype=torch.uint8, device=device, pin_memory=pinned)
        pieces = zip(room.split(aligned), occupied, parts, strict=True)
        mask, cos_sin, slots, self.rows, self.turn = (
            piece[:size].view(dtype).view(shape) for piece, size, (shape, dtype) in pieces
        )
        self.place, self.room = Place(slots, cos_sin, mask), room
        self._codec, self._frames = codec, frames

    def fill(self, codes: Tensor, before: int, turn: int) -> None:
        """For codes [N, T] on the host, behind `before` earlier frames."""
        self.rows.copy_((codes + self._codec.quantizers.starts[:, None]).T)
        self.turn.fill_(turn)
        place = self._codec.decoder.transformer.place(before, self._frames)
        for to, value in zip(self.place, place, strict=True):
            to.copy_(value)

    def moved(self) -> Given:
        """The same on the codec's device."""
        return Given(self._codec, self._frames, self.room.to(self._codec.device, non_blocking=True))


class Graph:
    """The decoder of so many frames as a CUDA graph. What goes in is copied to where the graph reads it; its past lies
    where that of other chunks lies.

    side: where it is captured. pool: memory of graphs that do not run at once.
    """

    def __init__(self, codec: Codec, frames: int, past: Past, side: torch.cuda.Stream, pool: Any) -> None:
        self._given = Given(codec, frames)
        rehearsal = Past(codec.device)
        with torch.cuda.device(codec.device):
            decode(codec, self._given, rehearsal)  # compiles and loads the kernels
            past.allocate(rehearsal)
            self._graph = torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    self._audio = decode(codec, self._given, past)
                finally:
                    self._graph.capture_end()
            torch.cuda.current_stream().wait_stream(side)

    def replay(self, given: Given) -> Tensor:
        with torch.cuda.device(self._audio.device):
            self._given.room.copy_(given.room, non_blocking=True)
            self._graph.replay()
            return self._audio.clone()


def decode(codec: Codec, given: Given, past: Past) -> Tensor:
    """The samples of frames behind `past`, [T * frame_samples]."""
    past.turn = given.turn
    return codec.decoder(codec.quantizers.vectors(given.rows).to(codec.dtype), past, given.place)
