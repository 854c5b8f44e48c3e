"""rms_norm on CUDA: csrc/cuda/rms_norm.cu."""

from __future__ import annotations

from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel
from s1kernels.backends.cuda.support import supports
from s1kernels.registry import implement

KERNEL = Kernel("rms_norm", "rms_norm", block=256, pointers="x weight out", ints="dim", floats="eps")


@implement("rms_norm", backend="cuda", supports=supports)
def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    if x.numel():
        KERNEL(x.dtype, x.device, grid=x.shape[0], x=x, weight=weight, out=out, dim=x.shape[1], eps=eps)
