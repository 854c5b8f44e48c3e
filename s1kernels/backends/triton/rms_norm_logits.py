"""rms_norm_logits in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.project import my_outs, my_rows, project, store, tiling
from s1kernels.backends.triton.rms_norm import rms_norm
from s1kernels.backends.triton.support import launch, supports
from s1kernels.registry import implement


@triton.jit
def rms_norm_logits_kernel(
    x, norm_weight, weight, logits, B, width, C, eps, ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr
):
    """logits = weight @ rms_norm(x). Mapping: project.py. Memory: the weight once for 8 rows of x."""
    rows, outs = my_rows(ROWS), my_outs(BLOCK_O)
    y = project(x, norm_weight, weight, rows, outs, B, width, C, eps, ROWS, BLOCK_O, BLOCK_C)
    store(logits, rows, outs, B, width, y)


@implement("rms_norm_logits", backend="triton", supports=supports)
def rms_norm_logits(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, out: tuple[Tensor, Tensor]) -> None:
    (B, C), width = x.shape, weight.shape[0]
    logits, normed = out
    grid, options = tiling(B, width, C)
    launch(rms_norm_logits_kernel, grid, x.device, x, norm_weight, weight, logits, B, width, C, eps, **options)
    rms_norm(x, norm_weight, eps, normed)
