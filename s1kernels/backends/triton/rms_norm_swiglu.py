"""rms_norm_swiglu in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.project import my_outs, my_rows, project, store, tiling
from s1kernels.backends.triton.support import launch, supports
from s1kernels.backends.triton.swiglu import gated
from s1kernels.registry import implement


@triton.jit
def rms_norm_swiglu_kernel(
    x, norm_weight, w1, w3, out, B, width, C, eps, ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out = silu(w1 @ n) * (w3 @ n), n = rms_norm(x). Mapping: project.py, one weight after the other. Memory: both
    weights once for 8 rows of x."""
    rows, outs = my_rows(ROWS), my_outs(BLOCK_O)
    gate = project(x, norm_weight, w1, rows, outs, B, width, C, eps, ROWS, BLOCK_O, BLOCK_C)
    up = project(x, norm_weight, w3, rows, outs, B, width, C, eps, ROWS, BLOCK_O, BLOCK_C)
    store(out, rows, outs, B, width, gated(gate, up))


@implement("rms_norm_swiglu", backend="triton", supports=supports)
def rms_norm_swiglu(x: Tensor, norm_weight: Tensor, w1: Tensor, w3: Tensor, eps: float, out: Tensor) -> None:
    (B, C), width = x.shape, w1.shape[0]
    grid, options = tiling(B, width, C)
    launch(rms_norm_swiglu_kernel, grid, x.device, x, norm_weight, w1, w3, out, B, width, C, eps, **options)
