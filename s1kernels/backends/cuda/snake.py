"""snake on CUDA: csrc/cuda/snake.cu."""

from __future__ import annotations

from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel
from s1kernels.backends.cuda.support import ceil_div, supports
from s1kernels.registry import implement

THREADS = 256
KERNEL = Kernel("snake", "snake", block=THREADS, pointers="x alpha out", ints="channels length row_blocks")


@implement("snake", backend="cuda", supports=supports)
def snake(x: Tensor, alpha: Tensor, out: Tensor) -> None:
    if x.numel():
        rows, channels, length = x.shape
        row_blocks = ceil_div(length * x.element_size(), 16 * THREADS)
        KERNEL(
            x.dtype, x.device, grid=rows * channels * row_blocks, x=x, alpha=alpha, out=out, channels=channels,
            length=length, row_blocks=row_blocks,
        )  # fmt: skip
