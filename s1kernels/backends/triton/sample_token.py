"""sample_token in Triton.

One draw from a row of logits, without a sort. Rows are ordered by descending logit, ties by ascending row. The best row
of all is proposed first; one pass finds what is ahead of it: their mass and number, which say whether the proposal is
kept, and the best of them, which is the next proposal if it is not, for all that is behind a row that is not kept is
not kept either. With noise that does not depend on the logits that takes about one proposal.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.support import launch, power_of_2, supports
from s1kernels.ops.sample_token import RAS_TEMPERATURE, RAS_TOP_P
from s1kernels.registry import implement

MOST_ROWS = 4096  # that a program takes at a time
_RAS_TEMPERATURE, _RAS_TOP_P = tl.constexpr(RAS_TEMPERATURE), tl.constexpr(RAS_TOP_P)
_NO_ROW = tl.constexpr(0x7FFFFFFF)


@triton.jit
def token_of(ids, row, inside):
    token = row
    if ids is not None:
        token = tl.load(ids + row, mask=inside, other=-1)
    return token


@triton.jit
def load_rows(logits, window, ids, penalty, start, V, W, PENALISE: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of BLOCK rows, whether they exist, and their logits as they are drawn from; -infinity past the last."""
    row = start + tl.arange(0, BLOCK)
    inside = row < V
    x = tl.load(logits + row, mask=inside, other=float("-inf")).to(tl.float32)
    if PENALISE:
        token = token_of(ids, row, inside)
        said = row < 0
        for w in range(W):
            said = said | (token == tl.load(window + w))
        x = tl.where(said, tl.where(x < 0, x * penalty, x / penalty), x)
    return row, inside, x


@triton.jit
def survey(
    logits, noise, window, ids, penalty, top, inverse_temperature, place_value, place_row, V, W,
    PENALISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is strictly ahead of a place: mass, number, and the row of the best score with its logit."""
    mass, count, best = 0.0, 0, float("-inf")
    best_row, best_value = _NO_ROW, float("-inf")
    for start in range(0, V, BLOCK):
        row, inside, x = load_rows(logits, window, ids, penalty, start, V, W, PENALISE, BLOCK)
        ahead = inside & ((x > place_value) | ((x == place_value) & (row < place_row)))
        mass += tl.sum(tl.where(ahead, tl.exp(x - top), 0.0), 0)
        count += tl.sum(ahead.to(tl.int32), 0)
        drawn = tl.load(noise + row, mask=inside, other=1.0).to(tl.float32)
        score = tl.where(ahead, (x - top) * inverse_temperature - tl.log(drawn), float("-inf"))
        here = tl.max(score, 0)
        here_row = tl.min(tl.where(ahead & (score == here), row, _NO_ROW), 0)
        here_value = tl.max(tl.where(row == here_row, x, float("-inf")), 0)
        better = (here > best) | ((here == best) & (here_row < best_row))
        best = tl.where(better, here, best)
        best_value = tl.where(better, here_value, best_value)
        best_row = tl.where(better, here_row, best_row)
    return mass, count, best_row, best_value


@triton.jit
def draw(
    logits, noise, window, ids, penalty, top, temperature, top_p, top_k, V, W, PENALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The row that is drawn."""
    inverse = 1.0 / tl.maximum(temperature, 1e-5)
    total, _, row, value = survey(
        logits, noise, window, ids, penalty, top, inverse, float("-inf"), _NO_ROW, V, W, PENALISE, BLOCK
    )
    kept = 0
    while kept == 0:
        mass, count, next_row, next_value = survey(
            logits, noise, window, ids, penalty, top, inverse, value, row, V, W, PENALISE, BLOCK
        )
        in_nucleus = (top_p >= 1.0) | (mass + tl.exp(value - top) <= top_p * total)
        fits = (count == 0) | (in_nucleus & ((top_k <= 0) | (count < top_k)))
        row = tl.where(fits, row, next_row)
        value = tl.where(fits, value, next_value)
        kept = fits.to(tl.int32)
    return row


@triton.jit
def sample_token_kernel(
    logits, noise, ras_noise, window, ids, temperature, top_p, repetition_penalty, top_k, out, V, W, semantic_begin,
    semantic_end, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the token drawn from a row of logits; -1 if they are not finite. Mapping: a program has a row. Memory: the
    logits three times, the noise twice, from L2 but for the first time."""
    b = tl.program_id(0).to(tl.int64)
    PENALISE: tl.constexpr = (window is not None) and (ras_noise is None)
    logits += b * V
    noise += b * V
    if window is not None:
        window += b * W
    penalty = tl.load(repetition_penalty)
    top = float("-inf")
    broken = 0
    for start in range(0, V, BLOCK):
        _, inside, x = load_rows(logits, window, ids, penalty, start, V, W, PENALISE, BLOCK)
        top = tl.maximum(top, tl.max(tl.where(x == x, x, float("-inf")), 0))
        broken += tl.sum((inside & (x != x)).to(tl.int32), 0)
    token = -1
    if (broken == 0) & (top > float("-inf")) & (top < float("inf")):
        k = tl.load(top_k)
        drawn = draw(
            logits, noise, window, ids, penalty, top, tl.load(temperature), tl.load(top_p), k, V, W, PENALISE, BLOCK
        )
        token = token_of(ids, drawn, drawn < V)
        if ras_noise is not None and window is not None:
            said = token < 0
            for w in range(W):
                said = said | (token == tl.load(window + w))
            if said & (token >= semantic_begin) & (token <= semantic_end):
                hot, wide = tl.full([], _RAS_TEMPERATURE, tl.float32), tl.full([], _RAS_TOP_P, tl.float32)
                drawn = draw(
                    logits, ras_noise + b * V, window, ids, penalty, top, hot, wide, k, V, W, PENALISE, BLOCK
                )  # fmt: skip
                token = token_of(ids, drawn, drawn < V)
    tl.store(out + b, token)


@implement("sample_token", backend="triton", supports=supports)
def sample_token(
    logits: Tensor, noise: Tensor, ras_noise: Tensor | None, window: Tensor | None, ids: Tensor | None,
    temperature: Tensor, top_p: Tensor, repetition_penalty: Tensor, top_k: Tensor, semantic_begin: int,
    semantic_end: int, out: Tensor,
) -> None:  # fmt: skip
    B, V = logits.shape
    block = min(power_of_2(V), MOST_ROWS)
    launch(
        sample_token_kernel, (B,), logits.device, logits, noise, ras_noise, window, ids, temperature, top_p,
        repetition_penalty, top_k, out, V, 0 if window is None else window.shape[1], semantic_begin, semantic_end,
        BLOCK=block, num_warps=8 if block > 1024 else 4,
    )  # fmt: skip
