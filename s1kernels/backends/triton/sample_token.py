"""sample_token in Triton: draw.py in one program, or for large vocabularies in two launches of many.

sample_token_survey: a program finds the best row of its chunk. sample_token_settle: a program finds what of its chunk
is ahead of the best of all; the last to finish decides, going over everything again if the first proposal is not kept.
Memory: logits and noise once; with chunks 16*V bytes more, in L2.

No later kernel starts before all that come before a draw have ended: attention_output.py counts on it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.cuda.support import ceil_div
from s1kernels.backends.triton.draw import best_of, draw, draw_from_memory, fits, is_ahead, scan, score_of
from s1kernels.backends.triton.pdl import let_next_start, wait_for_inputs
from s1kernels.backends.triton.rng import fast_log, noise_of
from s1kernels.backends.triton.support import launch, power_of_2, supports
from s1kernels.backends.triton.tuning import sizes
from s1kernels.ops.sample_token import RAS_TEMPERATURE, RAS_TOP_P
from s1kernels.registry import implement

_RAS_TEMPERATURE, _RAS_TOP_P = tl.constexpr(RAS_TEMPERATURE), tl.constexpr(RAS_TOP_P)
_NO_ROW = tl.constexpr(0x7FFFFFFF)


@triton.jit
def token_of(ids, row, inside):
    token = row
    if ids is not None:
        token = tl.load(ids + row, mask=inside, other=-1)
    return token


@triton.jit
def is_said(window, token, window_step, W: tl.constexpr):
    said = token != token
    for w in tl.static_range(W):
        said = said | (token == tl.load(window + w * window_step))
    return said


@triton.jit
def gumbel_of(noise, rng, offset, threads, token, row, inside, UNIFORM: tl.constexpr):
    """-log(noise) of rows: given, or drawn as torch would draw it for the whole vocabulary."""
    if noise is not None:
        drawn = tl.load(noise + row, mask=inside, other=1.0)
    else:
        drawn = noise_of(rng, offset, threads, token, UNIFORM)
    return -fast_log(drawn)


@triton.jit
def load_logits(logits, row, inside, said, penalty):
    """Logits as they are drawn from; -infinity past the last."""
    x = tl.load(logits + row, mask=inside, other=float("-inf"))
    if said is not None:
        x = tl.where(said, tl.where(x < 0, x * penalty, x / penalty), x)
    return x


@triton.jit
def top_of(x, inside):
    """The largest logit; infinity if there is a NaN."""
    broken = tl.max((inside & (x != x)).to(tl.int32), 0)
    return tl.where(broken > 0, float("inf"), tl.max(tl.where(x == x, x, float("-inf")), 0))


@triton.jit
def draws_again(window, token, semantic_begin, semantic_end, window_step, W: tl.constexpr):
    """Whether repetition-aware sampling draws again."""
    return is_said(window, token, window_step, W) & (token >= semantic_begin) & (token <= semantic_end)


@triton.jit
def finish(
    token, b, out, code, embedding, hidden, next_x, semantic_begin, out_stride, codebook_size, C, next_stride,
    hidden_stride, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What becomes of row b's token."""
    index = token
    if code is not None:
        index = tl.where(token >= 0, token - semantic_begin, token)
    index = tl.minimum(tl.maximum(index, 0), codebook_size - 1)
    tl.store(out + b * out_stride, token)
    if code is not None:
        tl.store(code + b * out_stride, index)
    if embedding is not None:
        c = tl.arange(0, BLOCK_C)
        to = next_x + b * next_stride + c
        tl.store(to, tl.load(embedding + index.to(tl.int64) * C + c, mask=c < C), mask=c < C)
        if hidden is not None:
            tl.store(to - C, tl.load(hidden + b * hidden_stride + c, mask=c < C), mask=c < C)


@triton.jit(do_not_specialize=["offset", "ras_offset", "out", "code"])
def sample_token_kernel(
    logits, noise, ras_noise, window, ids, temperature, top_p, repetition_penalty, top_k, rng, out, code, embedding,
    hidden, next_x, floats, ints, V, logits_stride, noise_stride, window_step, window_stride, semantic_begin,
    semantic_end, out_stride, codebook_size, C, next_stride, hidden_stride, threads, offset, ras_offset,
    W: tl.constexpr, RAS: tl.constexpr, UNIFORM: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = the token drawn from a row of logits; -1 if they are not finite. Mapping: a program has a row."""
    if rng is None:
        wait_for_inputs(PDL)
    b = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK)
    inside = row < V
    token_here = token_of(ids, row, inside)
    said = None
    if W > 0:
        window += b * window_stride
        if not RAS:
            said = is_said(window, token_here, window_step, W)
    if noise is not None:
        noise += b * noise_stride
    gumbel = gumbel_of(noise, rng, offset, threads, token_here, row, inside, UNIFORM)
    inverse = 1.0 / tl.maximum(tl.load(temperature), 1e-5)
    nucleus, most, penalty = tl.load(top_p), tl.load(top_k), tl.load(repetition_penalty)
    if rng is not None:
        wait_for_inputs(PDL)
    let_next_start(PDL)  # not before: what a later kernel reads before its own wait is then complete
    x = load_logits(logits + b * logits_stride, row, inside, said, penalty)
    top = top_of(x, inside)
    token = -1
    if (top > float("-inf")) & (top < float("inf")):
        drawn = draw(x, gumbel, row, inside, top, inverse, nucleus, most)
        token = token_of(ids, drawn, drawn < V)
        if RAS:  # noqa: SIM102  known when it is compiled
            if draws_again(window, token, semantic_begin, semantic_end, window_step, W):
                if ras_noise is not None:
                    ras_noise += b * noise_stride
                gumbel = gumbel_of(ras_noise, rng, ras_offset, threads, token_here, row, inside, UNIFORM)
                hot, wide = tl.full([], 1.0 / _RAS_TEMPERATURE, tl.float32), tl.full([], _RAS_TOP_P, tl.float32)
                drawn = draw(x, gumbel, row, inside, top, hot, wide, most)
                token = token_of(ids, drawn, drawn < V)
    finish(
        token, b, out, code, embedding, hidden, next_x, semantic_begin, out_stride, codebook_size, C, next_stride,
        hidden_stride, BLOCK_C,
    )  # fmt: skip


# What a row's programs leave each other, [8, CHUNKS] float32 after its V logits and V Gumbel numbers, and [3, CHUNKS]
# and one int32. Of a chunk: its top, its mass and best score relative to that, the best's logit and row; then of what
# is ahead of the first proposal: mass, number, best score, its logit and row. At last how many programs are through.
_TOP, _MASS, _BEST, _VALUE, _AHEAD_MASS, _AHEAD_BEST, _AHEAD_VALUE = (tl.constexpr(i) for i in range(7))
_ROW, _AHEAD_COUNT, _AHEAD_ROW, _ARRIVED = (tl.constexpr(i) for i in range(4))


@triton.jit(do_not_specialize=["offset", "ras_offset", "out", "code"])
def sample_token_survey_kernel(
    logits, noise, ras_noise, window, ids, temperature, top_p, repetition_penalty, top_k, rng, out, code, embedding,
    hidden, next_x, floats, ints, V, logits_stride, noise_stride, window_step, window_stride, semantic_begin,
    semantic_end, out_stride, codebook_size, C, next_stride, hidden_stride, threads, offset, ras_offset,
    W: tl.constexpr, RAS: tl.constexpr, UNIFORM: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best row of a chunk. Mapping: a program has a chunk of a row."""
    if rng is None:
        wait_for_inputs(PDL)
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = row < V
    token = token_of(ids, row, inside)
    said = None
    if W > 0 and not RAS:
        said = is_said(window + b * window_stride, token, window_step, W)
    if noise is not None:
        noise += b * noise_stride
    gumbel = gumbel_of(noise, rng, offset, threads, token, row, inside, UNIFORM)
    inverse = 1.0 / tl.maximum(tl.load(temperature), 1e-5)
    penalty = tl.load(repetition_penalty)
    if rng is not None:
        wait_for_inputs(PDL)
    let_next_start(PDL)  # not before: what a later kernel reads before its own wait is then complete
    x = load_logits(logits + b * logits_stride, row, inside, said, penalty)
    floats += b * (2 * V + 7 * CHUNKS)
    ints += b * (3 * CHUNKS + 1)
    tl.store(floats + row, x, mask=inside)
    tl.store(floats + V + row, gumbel, mask=inside)
    top = top_of(x, inside)
    level = tl.where(top == float("-inf"), 0.0, top)
    best, best_row, value = best_of(score_of(x, gumbel, level, inverse, inside), row, x, inside)
    of_chunk = floats + 2 * V + chunk
    tl.store(of_chunk + _TOP * CHUNKS, top)
    tl.store(of_chunk + _MASS * CHUNKS, tl.sum(tl.where(inside, tl.exp(x - level), 0.0), 0))
    tl.store(of_chunk + _BEST * CHUNKS, best)
    tl.store(of_chunk + _VALUE * CHUNKS, value)
    tl.store(ints + _ROW * CHUNKS + chunk, best_row)
    if chunk == 0:
        tl.store(ints + _ARRIVED * CHUNKS, 0)


@triton.jit(do_not_specialize=["offset", "ras_offset", "out", "code"])
def sample_token_settle_kernel(
    logits, noise, ras_noise, window, ids, temperature, top_p, repetition_penalty, top_k, rng, out, code, embedding,
    hidden, next_x, floats, ints, V, logits_stride, noise_stride, window_step, window_stride, semantic_begin,
    semantic_end, out_stride, codebook_size, C, next_stride, hidden_stride, threads, offset, ras_offset,
    W: tl.constexpr, RAS: tl.constexpr, UNIFORM: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The token, from what the survey found. Mapping: a program has a chunk of a row."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    chunk, chunks, b = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    floats += b * (2 * V + 7 * CHUNKS)
    ints += b * (3 * CHUNKS + 1)
    row = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(floats + row, mask=row < V, other=float("-inf"))
    gumbel = tl.load(floats + V + row, mask=row < V, other=0.0)
    inverse = 1.0 / tl.maximum(tl.load(temperature), 1e-5)
    c = tl.arange(0, CHUNKS)
    there = c < chunks
    parts = floats + 2 * V + c
    top_there = tl.load(parts + _TOP * CHUNKS, mask=there, other=float("-inf"))
    mass_there = tl.load(parts + _MASS * CHUNKS, mask=there, other=0.0)
    best_there = tl.load(parts + _BEST * CHUNKS, mask=there, other=float("-inf"))
    value_there = tl.load(parts + _VALUE * CHUNKS, mask=there, other=float("-inf"))
    row_there = tl.load(ints + _ROW * CHUNKS + c, mask=there, other=_NO_ROW)
    top = tl.max(top_there, 0)
    finite = (top > float("-inf")) & (top < float("inf"))
    level = tl.where(top_there == float("-inf"), 0.0, top_there)
    total = tl.sum(tl.where(mass_there > 0, mass_there * tl.exp(level - top), 0.0), 0)
    _, drawn, value = best_of(best_there + (level - top) * inverse, row_there, value_there, there)

    ahead = (row < V) & is_ahead(x, row, value, drawn)
    best, best_row, best_value = best_of(score_of(x, gumbel, top, inverse, ahead), row, x, ahead)
    of_chunk = floats + 2 * V + chunk
    tl.store(of_chunk + _AHEAD_MASS * CHUNKS, tl.sum(tl.where(ahead, tl.exp(x - top), 0.0), 0))
    tl.store(of_chunk + _AHEAD_BEST * CHUNKS, best)
    tl.store(of_chunk + _AHEAD_VALUE * CHUNKS, best_value)
    tl.store(ints + _AHEAD_COUNT * CHUNKS + chunk, tl.sum(ahead.to(tl.int32), 0))
    tl.store(ints + _AHEAD_ROW * CHUNKS + chunk, best_row)
    tl.debug_barrier()  # all of the program's results are written before it says so
    if tl.atomic_add(ints + _ARRIVED * CHUNKS, 1, sem="acq_rel") == chunks - 1:
        token = -1
        if finite:
            mass = tl.sum(tl.load(parts + _AHEAD_MASS * CHUNKS, mask=there, other=0.0, cache_modifier=".cg"), 0)
            count = tl.sum(tl.load(ints + _AHEAD_COUNT * CHUNKS + c, mask=there, other=0, cache_modifier=".cg"), 0)
            most, nucleus = tl.load(top_k), tl.load(top_p)
            if not fits(mass, count, value, top, total, nucleus, most):
                score = tl.load(parts + _AHEAD_BEST * CHUNKS, mask=there, other=float("-inf"), cache_modifier=".cg")
                row_there = tl.load(ints + _AHEAD_ROW * CHUNKS + c, mask=there, other=_NO_ROW, cache_modifier=".cg")
                value_there = tl.load(
                    parts + _AHEAD_VALUE * CHUNKS, mask=there, other=float("-inf"), cache_modifier=".cg"
                )
                _, drawn, value = best_of(score, row_there, value_there, row_there < _NO_ROW)
                drawn = draw_from_memory(floats, floats + V, V, drawn, value, total, top, inverse, nucleus, most, BLOCK)
            token = token_of(ids, drawn, drawn < V)
            if RAS:  # noqa: SIM102  known when it is compiled
                if draws_again(window + b * window_stride, token, semantic_begin, semantic_end, window_step, W):
                    if ras_noise is not None:
                        ras_noise += b * noise_stride
                    for start in range(0, V, BLOCK):
                        at = start + tl.arange(0, BLOCK)
                        name = token_of(ids, at, at < V)
                        again = gumbel_of(ras_noise, rng, ras_offset, threads, name, at, at < V, UNIFORM)
                        tl.store(floats + V + at, again, mask=at < V)
                    tl.debug_barrier()
                    hot, wide = tl.full([], 1.0 / _RAS_TEMPERATURE, tl.float32), tl.full([], _RAS_TOP_P, tl.float32)
                    total, _, drawn, value = scan(floats, floats + V, V, top, hot, float("-inf"), _NO_ROW, BLOCK)
                    drawn = draw_from_memory(floats, floats + V, V, drawn, value, total, top, hot, wide, most, BLOCK)
                    token = token_of(ids, drawn, drawn < V)
        finish(
            token, b, out, code, embedding, hidden, next_x, semantic_begin, out_stride, codebook_size, C, next_stride,
            hidden_stride, BLOCK_C,
        )  # fmt: skip


def enqueue(
    *, logits: Tensor, noise: Tensor | None, ras_noise: Tensor | None, window: Tensor | None, ids: Tensor | None,
    temperature: Tensor, top_p: Tensor, repetition_penalty: Tensor, top_k: Tensor, semantic_begin: int,
    semantic_end: int, out: Tensor, ras: bool, code: Tensor | None = None, codebook_size: int = 1,
    embedding: Tensor | None = None, hidden: Tensor | None = None, next_x: Tensor | None = None,
    rng: Tensor | None = None, threads: int = 1, offset: int = 0, ras_offset: int = 0, uniform: bool = False,
    pdl: bool = False,
) -> None:  # fmt: skip
    """One draw a row, and what a frame makes of it.

    Args:
        logits, noise, ras_noise: [B, V] float32, rows any distance apart; no noise with `rng`, or without `ras`.
        window: [B, W] int32, of any strides, or None.
        rng: [2] int64, seed and offset of torch's generator: the noise is then what torch would draw at that offset
            plus `offset` (`ras_offset`) over the whole vocabulary, in a grid of `threads` threads, by `exponential_`,
            or -log of `uniform_` if `uniform`. For one row. It, `window`, `ids` and the scalars may then be read before
            the stream's earlier kernels have ended: none of this frame may write them.
        out, code: [B] int32 of one stride: the token, and for the main draw its code in [0, codebook_size).
        embedding: [codebook_size, C]: row `code` (without `code`: the token) goes to `next_x` [B, C], rows any distance
            apart; `hidden` [B, C] goes where the C elements before it are.
        Others: as in `s1kernels.ops.sample_token`.
    """
    (B, V), size = logits.shape, sizes(logits.device)
    solo = size.solo_vocabulary >= V
    block = power_of_2(V) if solo else size.chunk
    chunks = 1 if solo else power_of_2(ceil_div(V, block))
    floats = ints = None
    if not solo:
        floats = torch.empty(B * (2 * V + 7 * chunks), dtype=torch.float32, device=logits.device)
        ints = torch.empty(B * (3 * chunks + 1), dtype=torch.int32, device=logits.device)
    C = 1 if embedding is None else embedding.shape[1]
    options: dict[str, Any] = dict(
        W=0 if window is None else window.shape[1], RAS=ras and window is not None, UNIFORM=uniform, BLOCK=block,
        CHUNKS=chunks, BLOCK_C=power_of_2(C), pdl=pdl, num_warps=max(4, min(16, block // 256)) if solo else 8,
    )  # fmt: skip
    steps = (1, 0) if window is None else (window.stride(1), window.stride(0))
    given = (
        logits, noise, ras_noise, window, ids, temperature, top_p, repetition_penalty, top_k, rng, out, code, embedding,
        hidden, next_x, floats, ints, V, logits.stride(0), 0 if noise is None else noise.stride(0), *steps,
        semantic_begin, semantic_end, out.stride(0), codebook_size, C, 0 if next_x is None else next_x.stride(0),
        0 if hidden is None else hidden.stride(0), threads, offset, ras_offset,
    )  # fmt: skip
    if solo:
        launch(sample_token_kernel, (B,), logits.device, *given, **options)
        return
    for kernel in (sample_token_survey_kernel, sample_token_settle_kernel):
        launch(kernel, (ceil_div(V, block), B), logits.device, *given, **options)


@implement("sample_token", backend="triton", supports=supports)
def sample_token(
    logits: Tensor, noise: Tensor, ras_noise: Tensor | None, window: Tensor | None, ids: Tensor | None,
    temperature: Tensor, top_p: Tensor, repetition_penalty: Tensor, top_k: Tensor, semantic_begin: int,
    semantic_end: int, out: Tensor,
) -> None:  # fmt: skip
    enqueue(
        logits=logits, noise=noise, ras_noise=ras_noise, window=window, ids=ids, temperature=temperature, top_p=top_p,
        repetition_penalty=repetition_penalty, top_k=top_k, semantic_begin=semantic_begin, semantic_end=semantic_end,
        out=out, ras=ras_noise is not None,
    )  # fmt: skip
