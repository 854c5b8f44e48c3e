"""Where the random numbers of a frame's draws come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s1kernels.model.config import DualARConfig
from s1kernels.sampling import Rows


@dataclass(frozen=True)
class Randomness:
    """Where a frame's noise comes from: tensors, or numbers drawn in the kernels as torch would draw them.

    main, ras: [B, V] float32; fast: [B, N-1, K'] float32. Without them:
    state: [2] int64, seed and offset. ras_offset, fast_offsets: what is added to the offset for these draws.
    main_threads, fast_threads: of the launch that torch would make. uniform: the noise is -log of torch's uniform_
    rather than its exponential_.
    """

    main: Tensor | None = None
    ras: Tensor | None = None
    fast: Tensor | None = None
    state: Tensor | None = None
    ras_offset: int = 0
    fast_offsets: tuple[int, ...] = ()
    main_threads: int = 1
    fast_threads: int = 1
    uniform: bool = False


class Draws:
    """The random numbers of a frame, in the order in which upstream draws them: same seed, same codes."""

    def __init__(self, config: DualARConfig, rows: Rows, fast_rows: int) -> None:
        device = rows.head.device
        self._uniform = config.line == "2.0"
        vocabulary = rows.head.shape[0] if rows.ids is None else config.vocab_size
        self._main_threads, self._fast_threads = torch_grid(device, vocabulary), torch_grid(device, fast_rows)
        main, fast = torch_offset(device, vocabulary), torch_offset(device, fast_rows)
        before = 2 * main if config.line == "2.0" else main
        self._ras_offset = main
        self.offsets: dict[str, Any] = {
            "main_threads": self._main_threads, "fast_threads": self._fast_threads, "fast_offset": before,
            "fast_step": fast,
        }  # fmt: skip
        """The same as `persistent_frame` takes it."""
        self._fast_offsets = tuple(before + i * fast for i in range(config.codebooks - 1))
        self.numbers = before + (config.codebooks - 1) * fast
        """By how much a frame moves the generator's offset on."""

    def randomness(self, state: Tensor) -> Randomness:
        """What the frame's launches need, with seed and offset in `state` ([2] int64)."""
        return Randomness(
            state=state, ras_offset=self._ras_offset, fast_offsets=self._fast_offsets,
            main_threads=self._main_threads, fast_threads=self._fast_threads, uniform=self._uniform,
        )  # fmt: skip


def torch_grid(device: torch.device, elements: int) -> int:
    """Threads of the grid that torch's `exponential_` and `uniform_` launch for a float32 tensor (`rng_threads`)."""
    gpu = torch.cuda.get_device_properties(device)
    return 256 * min(gpu.multi_processor_count * (gpu.max_threads_per_multi_processor // 256), -(-elements // 256))


def torch_offset(device: torch.device, elements: int) -> int:
    """What such a draw adds to the offset of torch's generator."""
    return 4 * -(-elements // (4 * torch_grid(device, elements)))
