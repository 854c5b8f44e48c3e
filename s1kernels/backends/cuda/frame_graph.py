"""Decodes frame after frame by replaying one CUDA graph whose state lives on the device.

A replay reads the last frame, position, window and random state from device memory and leaves the next ones there, so
the host only replays and, some frames later, reads the codes: it never waits for a frame before it asks for the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s1kernels.backends.cuda import persistent_frame
from s1kernels.backends.cuda.draws import Draws
from s1kernels.backends.cuda.launch import Kernel, Launch, current_stream
from s1kernels.backends.cuda.sample_token import Window
from s1kernels.cache import KVCache
from s1kernels.decoder import check_tokens, checked
from s1kernels.sampling import WINDOW, Rows, Sampling
from s1kernels.surfacing import surfacing

if TYPE_CHECKING:
    from s1kernels.backends.cuda.decode_frame import Frame

ADVANCE = Kernel(
    "advance", "advance", block=64, pointers="tokens codes position window index random",
    ints="codebooks width fill_first random_numbers",
)  # fmt: skip

ABANDONED = -2  # a code that the persistent kernel leaves when a block has waited too long for another
AHEAD = 4  # frames that may be under way before the host has seen the first of them


class FrameGraph:
    """A model's frame as one CUDA graph, captured when it is first needed and again when the cache has moved.

    Args:
        frame: the bound model. rows: the rows of the head that are sampled. cache: the slow stack's keys and values.
    """

    def __init__(self, frame: Frame, rows: Rows, cache: KVCache) -> None:
        self.frame, self.rows, self.cache = frame, rows, cache
        config, device = frame.config, frame.head.device
        self.device, codes = device, config.codebooks
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.main_logits = torch.zeros(1, rows.head.shape[0], **floats)
        self.fast_logits = torch.zeros(1, codes - 1, frame.fast_rows, **floats)
        self._tokens, self._codes = (torch.zeros(1, codes + 1, **ints) for _ in range(2))
        self._position, self._index = torch.zeros(1, **ints), torch.zeros(1, **ints)
        self._window = torch.zeros(codes + 1, WINDOW[config.line], **ints)
        self._random = torch.zeros(2, dtype=torch.int64, device=device)
        self._scalars = {name: torch.zeros((), **floats) for name in ("temperature", "top_p", "repetition_penalty")}
        self._scalars["top_k"] = torch.zeros((), **ints)
        self._ring = torch.zeros(AHEAD, codes + 1, dtype=torch.int32, device="cpu", pin_memory=True)
        self._arrived = [torch.cuda.Event() for _ in range(AHEAD)]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._launches: list[Launch] = []
        self._captured: tuple[int, ...] = ()
        self._draws = Draws(config, rows, frame.fast_rows)

    def decode(
        self, tokens: Tensor, position: int, count: int, sampling: Sampling, previous: Tensor | None,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """See `s1kernels.decoder.Decoder`."""
        if position < 0:
            raise ValueError(f"decode_frame: position must be at least 0, got {position}; the prompt starts at 0")
        generator = self._generator(generator)
        with torch.cuda.device(self.device), surfacing("start"):
            check_tokens(tokens, self.frame.config)
            self._start(tokens, position, sampling, previous, generator)
        asked, room = 0, self.frame.config.max_positions - position
        for received in range(count):
            with torch.cuda.device(self.device), surfacing(f"replay, position {position + received}"):
                while asked < min(count, received + AHEAD, max(room, received + 1)):
                    self._replay(position + asked)
                    self._ring[asked % AHEAD].copy_(self._codes[0], non_blocking=True)
                    self._arrived[asked % AHEAD].record()
                    asked += 1
                self._arrived[received % AHEAD].synchronize()
            codes = self._ring[received % AHEAD].clone()
            if int(codes[0]) == ABANDONED:
                raise RuntimeError(
                    f"decode_frame: the GPU gave up waiting for its own blocks in the replay, position "
                    f"{position + received}; pass persistent=False, and report it"
                )
            checked(codes, position + received)
            generator.set_offset(generator.get_offset() + self._draws.numbers)
            yield codes
            if int(codes[0]) == self.frame.config.end_token:
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

    @property
    def kernels(self) -> int:
        """Kernels in the graph; 0 before it is captured."""
        return len(self._launches)

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
        state = torch.tensor([_signed(generator.initial_seed()), generator.get_offset()])
        self._random.copy_(state, non_blocking=True)
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
            self._launches = self._frame_launches()
            graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    stream = current_stream(self.device)
                    for launch in self._launches:
                        launch.enqueue(stream)
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(side)
            self._graph, self._captured = graph, where

    def drop(self) -> None:
        """Free the graph, after the replays that are under way."""
        if self._graph is not None:
            torch.cuda.current_stream(self.device).synchronize()
        self._graph, self._launches, self._captured = None, [], ()

    def _frame_launches(self) -> list[Launch]:
        config, W = self.frame.config, self._window.shape[1]
        if config.line == "s1":  # upstream's: the main token is held against the window's first frame, codes and all
            main = Window(self._window, config.codebooks + 1, step=W)
            fast = [Window(self._window[i], W) for i in range(2, config.codebooks + 1)]
        else:
            main, fast = Window(self._window[0], W), []
        advance = ADVANCE.bind(
            self.frame.head.dtype, self.device, grid=1, tokens=self._tokens, codes=self._codes,
            position=self._position, window=self._window, index=self._index, random=self._random,
            codebooks=config.codebooks, width=W, fill_first=int(config.line == "s1"),
            random_numbers=self._draws.numbers,
        )  # fmt: skip
        if self.frame.persistent is None:
            launches = persistent_frame.launches(
                config, self.frame.weights, self.frame.head, tokens=self._tokens, position=self._position,
                k_caches=self.cache.k, v_caches=self.cache.v, window=self._window, ids=self.rows.ids,
                logit_bias=self.rows.bias, scalars=self._scalars, rng=self._random, main_logits=self.main_logits,
                fast_logits=self.fast_logits, out=self._codes, **self._draws.offsets,
            )  # fmt: skip
            return [*launches, advance]
        launches = self.frame.launches(
            self._tokens, self._position, self.cache.k, self.cache.v, main, fast, self._draws.randomness(self._random),
            self._scalars, self.rows.ids, self.rows.bias, self.main_logits, self.fast_logits, self._codes,
        )  # fmt: skip
        return [*launches, advance]

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


def _signed(seed: int) -> int:
    """A 64-bit seed as int64 holds it."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
