"""rms_norm in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.support import launch, power_of_2, supports
from s1kernels.registry import implement

MOST_COLUMNS = 4096  # that a program takes at a time


@triton.jit
def rms_norm_kernel(x, weight, out, C, eps, BLOCK: tl.constexpr):
    """out = x / sqrt(mean(x^2) + eps) * weight. Mapping: a program has a row, and goes through it twice: for the mean
    square and for the result."""
    x += tl.program_id(0).to(tl.int64) * C
    out += tl.program_id(0).to(tl.int64) * C
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(x + at, mask=at < C, other=0.0).to(tl.float32)
        squares += v * v
    scale = tl.rsqrt(tl.sum(squares, 0) / C + eps)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(x + at, mask=at < C, other=0.0).to(tl.float32)
        n = tl.load(weight + at, mask=at < C, other=0.0).to(tl.float32)
        tl.store(out + at, (v * scale * n).to(out.dtype.element_ty), mask=at < C)


@implement("rms_norm", backend="triton", supports=supports)
def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    B, C = x.shape
    block = min(power_of_2(C), MOST_COLUMNS)
    launch(rms_norm_kernel, (B,), x.device, x, weight, out, C, eps, BLOCK=block)
