"""sample_token on CUDA: csrc/cuda/sample_token.cu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel, Launch
from s1kernels.backends.cuda.support import ceil_div, run, supports
from s1kernels.registry import implement

THREADS = 256
CHUNK = 1024  # rows that a block of the large kernels takes
SOLO_VOCABULARY = 6000  # rows that one block keeps: 8 bytes each, in the 48 KB that every GPU has
_FIELDS = {
    "pointers": "logits noise ras_noise window ids temperature top_p repetition_penalty top_k logit_bias rng out code "
    "embedding hidden next_x scratch",
    "ints": "vocabulary logits_stride noise_stride window_length window_step window_stride semantic_begin semantic_end "
    "out_stride codebook_size dim next_stride hidden_stride ras rng_threads rng_offset ras_rng_offset rng_uniform",
}
SOLO = Kernel("sample_token", "sample_token", block=THREADS, **_FIELDS)
SURVEY = Kernel("sample_token", "sample_token_survey", block=THREADS, **_FIELDS)
SETTLE = Kernel("sample_token", "sample_token_settle", block=THREADS, **_FIELDS)


@dataclass(frozen=True)
class Window:
    """What repetition control looks at: `length` tokens, `step` elements apart; rows `stride` apart. None for none."""

    tokens: Tensor | None = None
    length: int = 0
    step: int = 1
    stride: int = 0


def scratch_bytes(rows: int, vocabulary: int) -> int:
    """What a draw needs beside its arguments: `Scratch` in csrc/cuda/sample_token.cu. Its contents do not matter."""
    if vocabulary <= SOLO_VOCABULARY:
        return 0
    chunks = ceil_div(vocabulary, CHUNK)
    return rows * ceil_div(chunks * (12 * CHUNK + 44) + 4, 128) * 128


def sampling_launches(
    dtype: torch.dtype, device: torch.device, *, logits: Tensor, noise: Tensor | None, ras_noise: Tensor | None,
    window: Window, ids: Tensor | None, temperature: Tensor, top_p: Tensor, repetition_penalty: Tensor, top_k: Tensor,
    semantic_begin: int, semantic_end: int, out: Tensor, rows: int, vocabulary: int, ras: bool,
    logit_bias: Tensor | None = None, out_stride: int = 1, code: Tensor | None = None, codebook_size: int = 1,
    embedding: Tensor | None = None, dim: int = 0, next_x: Tensor | None = None, next_stride: int = 0,
    hidden: Tensor | None = None, rng: Tensor | None = None, rng_threads: int = 1, rng_offset: int = 0,
    ras_rng_offset: int = 0, rng_uniform: bool = False,
) -> list[Launch]:  # fmt: skip
    """One draw a row, and what a frame makes of it, as launches to be enqueued in this order.

    Args:
        dtype: of `embedding`, `hidden` and `next_x`.
        logits: [B, V] float32, rows any distance apart; `logit_bias` is added to it in place.
        noise, ras_noise: [B, V] float32, rows equally far apart; None with `rng`, or without `ras`.
        rng: [2] int64, seed and offset of torch's generator: the kernel draws the noise that torch would at that offset
            plus `rng_offset` (`ras_rng_offset`), over the whole vocabulary, in a grid of `rng_threads` threads (see
            `torch_grid`): exponential_, or -log of uniform_ if `rng_uniform`. For one row. It, `window`, `ids` and the
            scalars are then read before the stream's earlier launches end: none of this frame may write them.
        out, code: int32, `out_stride` elements from row to row; the token, and for the main draw its code in
            [0, codebook_size).
        embedding: [codebook_size, C]: row `code` (without `code`: the token) goes to `next_x`, row b at b*next_stride;
            `hidden` [B, C] goes where the C elements before it are.
        Others: as in `s1kernels.ops.sample_token`.
    """
    if rng is not None and rows != 1:
        raise ValueError(f"sample_token: rows must be 1 where the kernel draws the noise, got {rows}; pass the noise")
    if rows == 0:
        return []
    scratch = torch.empty(scratch_bytes(rows, vocabulary), dtype=torch.uint8, device=device)
    values: dict[str, Any] = dict(
        logits=logits, noise=noise, ras_noise=ras_noise, window=window.tokens, ids=ids, temperature=temperature,
        top_p=top_p, repetition_penalty=repetition_penalty, top_k=top_k, logit_bias=logit_bias, rng=rng, out=out,
        code=code, embedding=embedding, hidden=hidden, next_x=next_x, scratch=scratch, vocabulary=vocabulary,
        logits_stride=logits.stride(0), noise_stride=0 if noise is None else noise.stride(0),
        window_length=window.length, window_step=window.step, window_stride=window.stride,
        semantic_begin=semantic_begin, semantic_end=semantic_end, out_stride=out_stride, codebook_size=codebook_size,
        dim=dim, next_stride=next_stride, hidden_stride=0 if hidden is None else hidden.stride(0), ras=int(ras),
        rng_threads=rng_threads, rng_offset=rng_offset, ras_rng_offset=ras_rng_offset, rng_uniform=int(rng_uniform),
    )  # fmt: skip
    if vocabulary <= SOLO_VOCABULARY:
        return [SOLO.bind(dtype, device, grid=rows, shared=8 * vocabulary, **values)]
    grid = (ceil_div(vocabulary, CHUNK), rows)
    return [kernel.bind(dtype, device, grid=grid, **values) for kernel in (SURVEY, SETTLE)]


@implement("sample_token", backend="cuda", supports=supports)
def sample_token(
    logits: Tensor, noise: Tensor, ras_noise: Tensor | None, window: Tensor | None, ids: Tensor | None,
    temperature: Tensor, top_p: Tensor, repetition_penalty: Tensor, top_k: Tensor, semantic_begin: int,
    semantic_end: int, out: Tensor,
) -> None:  # fmt: skip
    (rows, vocabulary), length = logits.shape, 0 if window is None else window.shape[1]
    launches = sampling_launches(
        torch.float32, logits.device, logits=logits, noise=noise, ras_noise=ras_noise,
        window=Window(window, length, 1, length), ids=ids, temperature=temperature, top_p=top_p,
        repetition_penalty=repetition_penalty, top_k=top_k, semantic_begin=semantic_begin, semantic_end=semantic_end,
        out=out, rows=rows, vocabulary=vocabulary, ras=ras_noise is not None,
    )  # fmt: skip
    run(launches, logits.device)
