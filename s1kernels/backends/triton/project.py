"""Matrix-vector products y = weight @ x for a few vectors x, the core of every projection.

Mapping: a program has BLOCK_O rows of the weight, all of their columns, and ROWS vectors; it keeps its products apart
by column until the end, so that a step is loads and fused multiply-adds alone. Numerics: all in float32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from s1kernels.backends.cuda.support import ceil_div
from s1kernels.backends.triton.support import INTERPRETED, power_of_2

MOST_ROWS = 8
"""Vectors that a program takes; more come in further programs, which read the weight again."""


@triton.jit
def project(
    x,
    norm_weight,
    weight,
    rows,
    outs,
    B,
    width,
    C,
    eps,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """weight[outs] @ n for n = x[rows], or rms_norm(x[rows]) if there is a norm weight: [ROWS, BLOCK_O] float32."""
    sums = tl.zeros([ROWS, BLOCK_O, BLOCK_C], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = (columns < C)[None, :]
        w_at = outs.to(tl.int64)[:, None] * C + columns[None, :]
        w = tl.load(weight + w_at, mask=(outs < width)[:, None] & inside, other=0.0).to(tl.float32)
        x_at = rows.to(tl.int64)[:, None] * C + columns[None, :]
        v = tl.load(x + x_at, mask=(rows < B)[:, None] & inside, other=0.0).to(tl.float32)
        if norm_weight is not None:
            squares += v * v
            v *= tl.load(norm_weight + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
        sums += v[:, None, :] * w[None, :, :]
    y = tl.sum(sums, 2)
    if norm_weight is not None:
        y *= tl.rsqrt(tl.sum(squares, 1) / C + eps)[:, None]
    return y


@triton.jit
def my_rows(ROWS: tl.constexpr):
    return tl.program_id(1) * ROWS + tl.arange(0, ROWS)


@triton.jit
def my_outs(BLOCK_O: tl.constexpr):
    return tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)


@triton.jit
def load_outs(vector, outs, width):
    """[1, BLOCK_O] float32 of a vector that has an element for every row of the weight."""
    return tl.load(vector + outs, mask=outs < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store(out, rows, outs, B, width, y):
    at = rows.to(tl.int64)[:, None] * width + outs[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(rows < B)[:, None] & (outs < width)[None, :])


def tiling(rows: int, outs: int, columns: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and options of a kernel with `rows` vectors, a weight of `outs` rows and `columns` columns.

    Four warps hold 4096 products of 4-row tiles; more vectors leave room for fewer columns at a time.
    """
    most = power_of_2(min(rows, MOST_ROWS)) if rows else 1
    block_o = 64 if INTERPRETED else 4  # the interpreter takes its time for every program
    block_c = min(power_of_2(columns), max(64, 1024 // most))
    grid = ceil_div(outs, block_o), ceil_div(rows, most)
    return grid, {"ROWS": most, "BLOCK_O": block_o, "BLOCK_C": block_c, "num_warps": 4}
