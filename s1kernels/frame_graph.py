"""Decodes frame after frame by replaying one CUDA graph whose state lives on the device.

A replay reads the last frame, position, window and random state from device memory and leaves the next ones there, so
the host only replays and, some frames later, reads the codes: it never waits for a frame before it asks for the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from s1kernels.cache import KVCache
from s1kernels.decoder import FrameBuffers, Noise, check_tokens, checked
from s1kernels.draws import Draws
from s1kernels.model.config import DualARConfig
from s1kernels.sampling import WINDOW, Rows, Sampling
from s1kernels.surfacing import surfacing

AHEAD = 4  # frames that may be under way before the host has seen the first of them


class FrameGraph(FrameBuffers, ABC):
    """A frame as one CUDA graph, captured when it is first needed and again when the cache has moved.

    Args:
        config: the model's shape. rows: the rows of the head that are sampled. cache: the slow stack's keys and values.
    """

    def __init__(self, config: DualARConfig, rows: Rows, cache: KVCache) -> None:
        super().__init__(config, rows, cache)
        self.device = rows.head.device
        self._index = torch.zeros_like(self._position)
        self._window = torch.zeros(config.codebooks + 1, WINDOW[config.line], dtype=torch.int32, device=self.device)
        self._random = torch.zeros(2, dtype=torch.int64, device=self.device)
        self._ring = torch.zeros(AHEAD, config.codebooks + 1, dtype=torch.int32, device="cpu", pin_memory=True)
        self._arrived = [torch.cuda.Event() for _ in range(AHEAD)]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: tuple[int, ...] = ()
        self._draws = Draws(config, rows, config.fast_rows)

    @abstractmethod
    def _make_ready(self) -> None:
        """Whatever may not happen during a capture of `_enqueue`. The state on the device stays as it is."""

    @abstractmethod
    def _enqueue(self) -> None:
        """Enqueue a frame, and then what makes its results the state that the next one starts from."""

    def decode(
        self, tokens: Tensor, position: int, count: int, sampling: Sampling, previous: Tensor | None,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """See `s1kernels.decoder.Decoder`."""
        if position < 0:
            raise ValueError(f"decode_frame: position must be at least 0, got {position}; the prompt starts at 0")
        generator = self._generator(generator)
        with torch.cuda.device(self.device), surfacing("start"):
            check_tokens(tokens, self.config)
            self._start(tokens, position, sampling, previous, generator)
        asked, room = 0, self.config.max_positions - position
        for received in range(count):
            with torch.cuda.device(self.device), surfacing(f"replay, position {position + received}"):
                while asked < min(count, received + AHEAD, max(room, received + 1)):
                    self._replay(position + asked)
                    self._ring[asked % AHEAD].copy_(self._codes[0], non_blocking=True)
                    self._arrived[asked % AHEAD].record()
                    asked += 1
                self._arrived[received % AHEAD].synchronize()
            codes = self._checked(self._ring[received % AHEAD].clone(), position + received)
            generator.set_offset(generator.get_offset() + self._draws.numbers)
            yield codes
            if int(codes[0]) == self.config.end_token:
                return

    def time_frames(self, position: int, frames: int) -> float:
        """Seconds a frame on the GPU, of `frames` replays in a row from `position` on; what they decode is dropped."""
        with torch.cuda.device(self.device), surfacing("timing"):
            self._position.fill_(position)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._prepare(position + frames)
            start.record()
            for i in range(frames):
                self._replay(position + i)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000 / frames

    def drop(self) -> None:
        """Free the graph, after the replays that are under way."""
        if self._graph is not None:
            torch.cuda.current_stream(self.device).synchronize()
        self._graph, self._captured = None, ()

    def _checked(self, codes: Tensor, position: int) -> Tensor:
        return checked(codes, position)

    def _start(
        self, tokens: Tensor, position: int, sampling: Sampling, previous: Tensor | None, generator: torch.Generator
    ) -> None:
        """Put the state of the frame to come on the device, after replays that are under way in whatever stream."""
        for event in self._arrived:
            torch.cuda.current_stream().wait_event(event)
        self._tokens.copy_(tokens)
        self._position.fill_(position)
        for name, value in vars(sampling).items():
            self._scalars[name].fill_(value)
        self._seed(generator)
        self._index.fill_(-1 if previous is None else 0)
        self._window.fill_(-1)  # no token: nothing has been said
        if previous is not None:
            width = previous.shape[1]
            if width > self._window.shape[1]:
                raise ValueError(
                    f"decode_frame: previous must be [N+1, W <= {self._window.shape[1]}], got {list(previous.shape)}; "
                    "pass the last frames only"
                )
            self._window[:, :width] = previous

    def _seed(self, generator: torch.Generator) -> None:
        """Go on where the generator is."""
        state = torch.tensor([_signed(generator.initial_seed()), generator.get_offset()])
        self._random.copy_(state, non_blocking=True)

    def _rehearse(self) -> None:
        """Run the frame that comes next once, so that its kernels are compiled and loaded, and forget it."""
        state = (self._tokens, self._position, self._index, self._window, self._random)
        before = [tensor.clone() for tensor in state]
        self._enqueue()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    def _replay(self, position: int) -> None:
        self._prepare(position + 1)
        assert self._graph is not None
        self._graph.replay()

    def _prepare(self, positions: int) -> None:
        """Make room in the cache, and capture the frame if the cache has moved."""
        self.cache.reserve(positions)
        where = (self.cache.capacity, *(tensor.data_ptr() for tensor in (*self.cache.k, *self.cache.v)))
        if self._graph is not None and where == self._captured:
            return
        self.drop()
        with surfacing("capture"):
            self._make_ready()
            graph, side = self._new_graph(), torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._enqueue()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(side)
            self._graph, self._captured = graph, where

    def _new_graph(self) -> torch.cuda.CUDAGraph:
        return torch.cuda.CUDAGraph()

    def _generator(self, generator: torch.Generator | None) -> torch.Generator:
        if generator is None:
            torch.cuda.init()
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            return torch.cuda.default_generators[index]
        if generator.device.type != "cuda":
            raise ValueError(
                f"decode_frame: generator must be on {self.device}, got {generator.device}; "
                f"make it by torch.Generator({str(self.device)!r})"
            )
        return generator


class OpsGraph(FrameGraph):
    """The graph of a frame that is run op by op, whoever serves them: what is between the ops are torch's kernels.

    Args:
        program: an `OpsProgram` whose ops never look at the GPU from the host.
        Others: as for `FrameGraph`.
    """

    def __init__(self, config: DualARConfig, rows: Rows, cache: KVCache, program: Any) -> None:
        super().__init__(config, rows, cache)
        self.program, self._noise = program, Noise(config, rows)
        self._numbers = torch.Generator(self.device)
        self._columns = torch.arange(self._window.shape[1], device=self.device)

    def _new_graph(self) -> torch.cuda.CUDAGraph:
        graph = super()._new_graph()
        graph.register_generator_state(self._numbers)
        return graph

    def _seed(self, generator: torch.Generator) -> None:
        self._numbers.manual_seed(generator.initial_seed())
        self._numbers.set_offset(generator.get_offset())

    def _make_ready(self) -> None:
        offset = self._numbers.get_offset()
        self._rehearse()
        self._numbers.set_offset(offset)

    @torch.inference_mode()
    def _enqueue(self) -> None:
        self._noise.draw(self._numbers)
        given = self.arguments(self._window, self._noise)
        self.program(*given, self.main_logits, self.fast_logits, self._codes)
        codes, window, index = self._codes[0, :, None], self._window, self._index
        said = torch.cat([window[:, 1:], codes], dim=1)
        if self.config.line == "s1":  # the window fills from the left before it shifts
            said = torch.where(index < len(self._columns), torch.where(self._columns == index, codes, window), said)
        window.copy_(said.masked_fill(index < 0, 0))
        self._tokens.copy_(self._codes)
        index.add_(1)
        self._position.add_(1)


def _signed(seed: int) -> int:
    """A 64-bit seed as int64 holds it."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
