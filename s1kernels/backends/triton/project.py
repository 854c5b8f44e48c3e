"""Matrix-vector products y = weight @ x for a few vectors x, the core of every projection.

Mapping: a program has BLOCK_O rows of the weight and takes one vector after the other. It loads the first BLOCK_C
columns of its rows (WHOLE: all of them) at once, before it waits for the vectors. Memory: the weight once for all
vectors if WHOLE. Numerics: all in float32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.cuda.support import ceil_div
from s1kernels.backends.triton.support import power_of_2
from s1kernels.backends.triton.tuning import sizes

MOST_COLUMNS = 8192  # of a tile; more take several turns


@triton.jit
def load_tile(weight, outs, columns, width, C):
    """weight[outs, columns]; zeros past its end."""
    at = outs.to(tl.int64)[:, None] * C + columns[None, :]
    return tl.load(weight + at, mask=(outs < width)[:, None] & (columns < C)[None, :], other=0.0)


@triton.jit
def load_vector(x, at, size):
    """x[at] in float32; zeros past its end."""
    return tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)


@triton.jit
def project(
    x, norm_weight, norm, weight, tile, second, second_tile, outs, columns, width, C, eps, BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """weight[outs] @ n and second[outs] @ n, for n = x, or rms_norm(x) if there is a norm weight: [BLOCK_O] float32.

    `norm`, `tile` and `second_tile` are the first columns of `norm_weight`, `weight` and `second`. Without a second
    weight its result is the first's.
    """
    v = load_vector(x, columns, C)
    squares = v * v
    if norm_weight is not None:
        v *= norm
    sums = tile.to(tl.float32) * v[None, :]
    if second is not None:
        second_sums = second_tile.to(tl.float32) * v[None, :]
    if not WHOLE:
        for start in range(BLOCK_C, C, BLOCK_C):
            at = start + columns
            v = load_vector(x, at, C)
            squares += v * v
            if norm_weight is not None:
                v *= load_vector(norm_weight, at, C)
            sums += load_tile(weight, outs, at, width, C).to(tl.float32) * v[None, :]
            if second is not None:
                second_sums += load_tile(second, outs, at, width, C).to(tl.float32) * v[None, :]
    y = tl.sum(sums, 1)
    if norm_weight is not None:
        scale = tl.rsqrt(tl.sum(squares, 0) / C + eps)
        y *= scale
    z = y
    if second is not None:
        z = tl.sum(second_sums, 1)
        if norm_weight is not None:
            z *= scale
    return y, z


@triton.jit
def my_outs(BLOCK_O: tl.constexpr):
    return tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)


@triton.jit
def store(out, outs, width, y):
    tl.store(out + outs, y.to(out.dtype.element_ty), mask=outs < width)


def tiling(weight: Tensor, weights: int = 1) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and options of a kernel with so many weights of that shape."""
    (outs, columns), size = weight.shape, sizes(weight.device)
    block_c = min(power_of_2(columns), MOST_COLUMNS)
    block_o = min(max(1, size.tile // (block_c * weights)), power_of_2(outs))
    while block_o > 1 and ceil_div(outs, block_o) < size.fewest_programs:
        block_o //= 2
    options = {"BLOCK_O": block_o, "BLOCK_C": block_c, "WHOLE": columns <= block_c, "num_warps": 4}
    return (ceil_div(outs, block_o),), options
