"""embed_frame in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.cuda.support import ceil_div
from s1kernels.backends.triton.pdl import let_next_start
from s1kernels.backends.triton.support import launch, power_of_2, supports
from s1kernels.registry import implement

BLOCK = 128  # columns of a program: eight programs for S1-mini


@triton.jit
def embedding(table, index, size, first_row, at, C):
    """Rows first_row + index [n, 1] of a table, of which `size` rows each may be asked for; else NaN."""
    row = first_row + tl.minimum(tl.maximum(index, 0), size - 1)
    x = tl.load(table + row.to(tl.int64) * C + at, mask=at < C, other=0.0).to(tl.float32)
    return tl.where((index >= 0) & (index < size), x, float("nan"))


@triton.jit
def embed_frame_kernel(
    tokens, text_embedding, codebook_embedding, out, C, N, K, text_rows, semantic_begin, semantic_end, factor,
    CODEBOOKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = text[t0] + sum_i codebook[i*K + t_(i+1)], times factor, for a semantic t0; else text[t0]. Mapping: a
    program has BLOCK columns of a row, and loads those of all codebooks at once. A token or code out of range gives
    NaN: the host cannot see it."""
    let_next_start(PDL)
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    i = tl.arange(0, CODEBOOKS)
    main = tl.load(tokens + row * (N + 1) + tl.zeros([1], tl.int32))[:, None]
    codes = tl.load(tokens + row * (N + 1) + 1 + i, mask=i < N, other=0)[:, None]
    semantic = (main >= semantic_begin) & (main <= semantic_end)
    text = embedding(text_embedding, main, text_rows, 0, at, C)
    # Without a semantic token the codes mean nothing, and none is out of range.
    parts = embedding(codebook_embedding, tl.where(semantic, codes, 0), K, tl.where(i < N, i * K, 0)[:, None], at, C)
    sums = tl.sum(tl.where((i < N)[:, None], parts, 0.0), 0)[None, :]
    x = tl.where(semantic, (text + sums) * factor, text)
    tl.store(out + row * C + at, x.to(out.dtype.element_ty), mask=at < C)


def enqueue(
    tokens: Tensor, text_embedding: Tensor, codebook_embedding: Tensor, semantic_begin: int, semantic_end: int,
    scale: bool, out: Tensor, *, hurry: bool = False,
) -> None:  # fmt: skip
    """The op. It waits for all earlier kernels of the stream; with `hurry` later ones need not wait for it."""
    (B, columns), (text_rows, C) = tokens.shape, text_embedding.shape
    N = columns - 1
    launch(
        embed_frame_kernel, (ceil_div(C, BLOCK), B), tokens.device, tokens, text_embedding, codebook_embedding, out, C,
        N, codebook_embedding.shape[0] // N, text_rows, semantic_begin, semantic_end,
        columns**-0.5 if scale else 1.0, CODEBOOKS=power_of_2(N), BLOCK=BLOCK, PDL=hurry,
    )  # fmt: skip


@implement("embed_frame", backend="triton", supports=supports)
def embed_frame(
    tokens: Tensor, text_embedding: Tensor, codebook_embedding: Tensor, semantic_begin: int, semantic_end: int,
    scale: bool, out: Tensor,
) -> None:  # fmt: skip
    enqueue(tokens, text_embedding, codebook_embedding, semantic_begin, semantic_end, scale, out)
