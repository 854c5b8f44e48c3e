"""rms_norm_logits in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.pdl import let_next_start, wait_for_inputs
from s1kernels.backends.triton.project import load_tile, load_vector, my_outs, project, store, tiling
from s1kernels.backends.triton.support import launch, supports
from s1kernels.registry import implement


@triton.jit
def rms_norm_logits_kernel(
    x, norm_weight, weight, bias, logits, normed, B, width, C, x_stride, logits_stride, eps, BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits = weight @ normed + bias, normed = rms_norm(x), which the first program writes too. Mapping: project.py.
    Memory: the weight once."""
    let_next_start(PDL)
    outs, columns = my_outs(BLOCK_O), tl.arange(0, BLOCK_C)
    tile = load_tile(weight, outs, columns, width, C)
    if bias is not None:
        plus = load_vector(bias, outs, width)
    norm = load_vector(norm_weight, columns, C)
    wait_for_inputs(PDL)
    for _ in range(B):
        y, _z = project(x, norm_weight, norm, weight, tile, None, None, outs, columns, width, C, eps, BLOCK_C, WHOLE)
        if bias is not None:
            y += plus
        store(logits, outs, width, y)
        if normed is not None:
            if tl.program_id(0) == 0:
                write_normed(x, norm_weight, normed, columns, C, eps, BLOCK_C)
            normed += C
        x += x_stride
        logits += logits_stride


@triton.jit
def write_normed(x, norm_weight, normed, columns, C, eps, BLOCK_C: tl.constexpr):
    squares = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        v = load_vector(x, start + columns, C)
        squares += v * v
    scale = tl.rsqrt(tl.sum(squares, 0) / C + eps)
    for start in range(0, C, BLOCK_C):
        at = start + columns
        store(normed, at, C, load_vector(x, at, C) * scale * load_vector(norm_weight, at, C))


def enqueue(
    x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, logits: Tensor, normed: Tensor | None,
    bias: Tensor | None = None, *, pdl: bool = False,
) -> None:  # fmt: skip
    """The op, plus `bias` [V] float32. Rows of x and logits may be any distance apart. With `pdl` weights and bias may
    be read before earlier kernels of the stream have ended."""
    (B, C), width = x.shape, weight.shape[0]
    grid, options = tiling(weight)
    if B:
        given = (x, norm_weight, weight, bias, logits, normed, B, width, C, x.stride(0), logits.stride(0), eps)
        launch(rms_norm_logits_kernel, grid, x.device, *given, pdl=pdl, **options)


@implement("rms_norm_logits", backend="triton", supports=supports)
def rms_norm_logits(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, out: tuple[Tensor, Tensor]) -> None:
    enqueue(x, norm_weight, weight, eps, *out)
