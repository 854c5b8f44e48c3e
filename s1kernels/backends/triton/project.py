"""Matrix-vector products y = weight @ x for a few vectors x, the core of every projection.

Mapping: a program has BLOCK_O rows of the weight and takes one vector after the other. It loads the first BLOCK_C
columns of its rows (WHOLE: all of them) at once, before it waits for the vectors. Columns are two dimensions, 256 of
them along a warp: so Triton gives a warp whole rows where there are as many rows as warps, which need no barrier for
their sums, and every warp reads the vector for itself. Memory: the weight once for all vectors if WHOLE. Numerics: all
in float32.
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
ALONG = tl.constexpr(256)  # columns that the lanes of a warp load at once, eight each


@triton.jit
def load_tile(weight, outs, columns, width, C):
    """weight[outs, columns]; zeros past its end."""
    at = outs.to(tl.int64)[:, None, None] * C + columns
    return tl.load(weight + at, mask=(outs < width)[:, None, None] & (columns < C), other=0.0)


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
    sums = tile.to(tl.float32) * v
    if second is not None:
        second_sums = second_tile.to(tl.float32) * v
    if not WHOLE:
        for start in range(BLOCK_C, C, BLOCK_C):
            at = start + columns
            v = load_vector(x, at, C)
            squares += v * v
            if norm_weight is not None:
                v *= load_vector(norm_weight, at, C)
            sums += load_tile(weight, outs, at, width, C).to(tl.float32) * v
            if second is not None:
                second_sums += load_tile(second, outs, at, width, C).to(tl.float32) * v
    y = sum_of_row(sums)
    if norm_weight is not None:
        scale = tl.rsqrt(sum_of_row(squares) / C + eps)
        y *= scale
    z = y
    if second is not None:
        z = sum_of_row(second_sums)
        if norm_weight is not None:
            z *= scale
    return y, z


@triton.jit
def sum_of_row(x):
    """[BLOCK_O], of [BLOCK_O, n, m]."""
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def my_outs(BLOCK_O: tl.constexpr):
    return tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)


@triton.jit
def my_columns(BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_O, n, m]: the first BLOCK_C columns, once for each row."""
    along: tl.constexpr = min(ALONG, BLOCK_C)
    turns: tl.constexpr = BLOCK_C // along
    columns = tl.arange(0, turns)[:, None] * along + tl.arange(0, along)[None, :]
    return tl.broadcast_to(columns[None, :, :], (BLOCK_O, turns, along))


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
    warps = max(4, min(block_o, 8))
    options = {"BLOCK_O": block_o, "BLOCK_C": block_c, "WHOLE": columns <= block_c, "num_warps": warps}
    return (ceil_div(outs, block_o),), options
