"""snake on CUDA: csrc/cuda/snake.cu."""

from __future__ import annotations

from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel
from s1kernels.backends.cuda.support import ceil_div, supports
from s1kernels.registry import implement

THREADS = 256
KERNEL = Kernel(
    "snake", "snake", block=THREADS, pointers="x bias alpha past_cache turn out",
    ints="steps channels reach taps dilation stride packs",
)  # fmt: skip


@implement("snake", backend="cuda", supports=supports)
def snake(
    x: Tensor, bias: Tensor | None, alpha: Tensor | None, past_cache: Tensor, turn: Tensor, taps: int, dilation: int,
    stride: int, out: Tensor,
) -> None:  # fmt: skip
    (steps, channels), reach = x.shape, past_cache.shape[1]
    pointers = [t.data_ptr() for t in (x, bias, alpha, past_cache, out) if t is not None]
    row_bytes = channels * x.element_size()
    packs = channels if any(at % 16 for at in (*pointers, row_bytes)) else row_bytes // 16
    KERNEL(
        x.dtype, x.device, grid=ceil_div(reach + steps, max(1, THREADS // packs)), x=x, bias=bias, alpha=alpha,
        past_cache=past_cache, turn=turn, out=out, steps=steps, channels=channels, reach=reach, taps=taps,
        dilation=dilation, stride=stride, packs=packs,
    )  # fmt: skip
