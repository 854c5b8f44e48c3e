"""embed_frame in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.cuda.support import ceil_div
from s1kernels.backends.triton.support import launch, supports
from s1kernels.registry import implement

BLOCK = 512


@triton.jit
def embedding(table, index, size, first_row, at, C):
    """Row first_row + index of a table, of which `size` rows may be asked for; else NaN."""
    row = first_row + tl.minimum(tl.maximum(index, 0), size - 1)
    x = tl.load(table + row.to(tl.int64) * C + at, mask=at < C, other=0.0).to(tl.float32)
    return tl.where((index >= 0) & (index < size), x, float("nan"))


@triton.jit
def embed_frame_kernel(
    tokens, text_embedding, codebook_embedding, out, C, N, K, text_rows, semantic_begin, semantic_end, factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = text[t0] + sum_i codebook[i*K + t_(i+1)], times factor, for a semantic t0; else text[t0]. Mapping: a
    program has BLOCK columns of a row. A token or code out of range gives NaN: the host cannot see it."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    main = tl.load(tokens + row * (N + 1))
    sums = embedding(text_embedding, main, text_rows, 0, at, C)
    if (main >= semantic_begin) & (main <= semantic_end):
        for i in range(N):
            sums += embedding(codebook_embedding, tl.load(tokens + row * (N + 1) + 1 + i), K, i * K, at, C)
        sums *= factor
    tl.store(out + row * C + at, sums.to(out.dtype.element_ty), mask=at < C)


@implement("embed_frame", backend="triton", supports=supports)
def embed_frame(
    tokens: Tensor, text_embedding: Tensor, codebook_embedding: Tensor, semantic_begin: int, semantic_end: int,
    scale: bool, out: Tensor,
) -> None:  # fmt: skip
    (B, columns), (text_rows, C) = tokens.shape, text_embedding.shape
    N = columns - 1
    launch(
        embed_frame_kernel, (ceil_div(C, BLOCK), B), tokens.device, tokens, text_embedding, codebook_embedding, out, C,
        N, codebook_embedding.shape[0] // N, text_rows, semantic_begin, semantic_end,
        columns**-0.5 if scale else 1.0, BLOCK=BLOCK,
    )  # fmt: skip
