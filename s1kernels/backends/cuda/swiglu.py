"""swiglu on CUDA: csrc/cuda/swiglu.cu."""

from __future__ import annotations

from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel
from s1kernels.backends.cuda.support import ceil_div, supports
from s1kernels.registry import implement

THREADS = 256
KERNEL = Kernel("swiglu", "swiglu", block=THREADS, pointers="gate up out", ints="rows hidden")


@implement("swiglu", backend="cuda", supports=supports)
def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    if gate.numel():
        blocks = ceil_div(gate.numel() * gate.element_size(), 16 * THREADS)
        rows, hidden = gate.shape
        KERNEL(gate.dtype, gate.device, grid=blocks, gate=gate, up=up, out=out, rows=rows, hidden=hidden)
