"""A frame's launches as a CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from s1kernels import frame_graph
from s1kernels.backends.cuda import persistent_frame
from s1kernels.backends.cuda.launch import Kernel, Launch
from s1kernels.backends.cuda.sample_token import Window
from s1kernels.backends.cuda.support import run
from s1kernels.cache import KVCache
from s1kernels.sampling import Rows

if TYPE_CHECKING:
    from s1kernels.backends.cuda.decode_frame import Frame

ADVANCE = Kernel(
    "advance", "advance", block=64, pointers="tokens codes position window index random",
    ints="codebooks width fill_first random_numbers",
)  # fmt: skip

ABANDONED = -2  # a code that the persistent kernel leaves when a block has waited too long for another


class FrameGraph(frame_graph.FrameGraph):
    """The graph of a bound model.

    Args:
        frame: the bound model. rows: the rows of the head that are sampled. cache: the slow stack's keys and values.
    """

    def __init__(self, frame: Frame, rows: Rows, cache: KVCache) -> None:
        super().__init__(frame.config, rows, cache)
        self.frame = frame
        self._launches: list[Launch] = []

    @property
    def kernels(self) -> int:
        """Kernels in the graph; 0 before it is captured."""
        return len(self._launches)

    def drop(self) -> None:
        super().drop()
        self._launches = []

    def _make_ready(self) -> None:
        self._launches = self._frame_launches()

    def _enqueue(self) -> None:
        run(self._launches, self.device)

    def _checked(self, codes: Tensor, position: int) -> Tensor:
        if int(codes[0]) == ABANDONED:
            raise RuntimeError(
                f"decode_frame: the GPU gave up waiting for its own blocks in the replay, position {position}; pass "
                "persistent=False, and report it"
            )
        return super()._checked(codes, position)

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
                config, self.frame.weights, self.frame.head, self.frame.packed, tokens=self._tokens,
                position=self._position, k_caches=self.cache.k, v_caches=self.cache.v, window=self._window,
                ids=self.rows.ids, logit_bias=self.rows.bias, scalars=self._scalars, rng=self._random,
                main_logits=self.main_logits, fast_logits=self.fast_logits, out=self._codes, **self._draws.offsets,
            )  # fmt: skip
            return [*launches, advance]
        launches = self.frame.launches(
            self._tokens, self._position, self.cache.k, self.cache.v, main, fast, self._draws.randomness(self._random),
            self._scalars, self.rows.ids, self.rows.bias, self.main_logits, self.fast_logits, self._codes,
        )  # fmt: skip
        return [*launches, advance]
