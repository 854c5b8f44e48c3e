"""One draw from a row of logits, without a sort.

Rows are ordered by descending logit, ties by ascending row. Kept is a prefix of that order: the rows up to which the
probabilities sum to at most top_p, top_k rows at most, one at least. Drawn is the kept row of the best score
(logit - top) / temperature - log(noise), ties to the lower row. The best row of all is proposed first; what is ahead of
it says whether it is kept: their mass and number. If not, the best of them is proposed next, for all that is behind a
row that is not kept is not kept either. With noise that does not depend on the logits that takes about one proposal.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_ROW = tl.constexpr(0x7FFFFFFF)


@triton.jit
def score_of(x, gumbel, top, inverse_temperature, inside):
    score = (x - top) * inverse_temperature + gumbel
    return tl.where(inside & (score == score), score, float("-inf"))


@triton.jit
def is_ahead(x, row, place_value, place_row):
    return (x > place_value) | ((x == place_value) & (row < place_row))


@triton.jit
def best_of(score, row, x, among):
    """Row and logit of the best score among some rows; NO_ROW and -infinity for none."""
    best = tl.max(tl.where(among, score, float("-inf")), 0)
    best_row = tl.min(tl.where(among & (score == best), row, NO_ROW), 0)
    return best, best_row, tl.max(tl.where(row == best_row, x, float("-inf")), 0)


@triton.jit
def fits(mass, count, value, top, total, top_p, top_k):
    """Whether a row of logit `value` is kept, with so much ahead of it."""
    in_nucleus = (top_p >= 1.0) | (mass + tl.exp(value - top) <= top_p * total)
    return (count == 0) | (in_nucleus & ((top_k <= 0) | (count < top_k)))


@triton.jit
def draw(x, gumbel, row, inside, top, inverse_temperature, top_p, top_k):
    """The row drawn from logits that a program holds."""
    score = score_of(x, gumbel, top, inverse_temperature, inside)
    weight = tl.where(inside, tl.exp(x - top), 0.0)
    total = tl.sum(weight, 0)
    _, drawn, value = best_of(score, row, x, inside)
    kept = 0
    while kept == 0:
        ahead = inside & is_ahead(x, row, value, drawn)
        mass, count = tl.sum(tl.where(ahead, weight, 0.0), 0), tl.sum(ahead.to(tl.int32), 0)
        _, next_row, next_value = best_of(score, row, x, ahead)
        stays = fits(mass, count, value, top, total, top_p, top_k)
        drawn = tl.where(stays, drawn, next_row)
        value = tl.where(stays, value, next_value)
        kept = stays.to(tl.int32)
    return drawn


@triton.jit
def scan(values, gumbels, V, top, inverse_temperature, place_value, place_row, BLOCK: tl.constexpr):
    """What is ahead of a place among V logits in memory: mass, number, and the row of the best score with its logit."""
    lane = tl.arange(0, BLOCK)
    mass, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    best, best_value = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
    best_row = tl.full([BLOCK], NO_ROW, tl.int32)
    for start in range(0, V, BLOCK):
        row = start + lane
        x = tl.load(values + row, mask=row < V, other=float("-inf"), cache_modifier=".cg")
        gumbel = tl.load(gumbels + row, mask=row < V, other=0.0, cache_modifier=".cg")
        ahead = (row < V) & is_ahead(x, row, place_value, place_row)
        mass += tl.where(ahead, tl.exp(x - top), 0.0)
        count += ahead.to(tl.int32)
        score = score_of(x, gumbel, top, inverse_temperature, ahead)
        better = ahead & ((score > best) | (best_row == NO_ROW))
        best = tl.where(better, score, best)
        best_row = tl.where(better, row, best_row)
        best_value = tl.where(better, x, best_value)
    _, row, value = best_of(best, best_row, best_value, best_row < NO_ROW)
    return tl.sum(mass, 0), tl.sum(count, 0), row, value


@triton.jit
def draw_from_memory(
    values, gumbels, V, drawn, value, total, top, inverse_temperature, top_p, top_k, BLOCK: tl.constexpr
):
    """The row drawn, when `drawn` with its logit `value` is proposed first."""
    kept = 0
    while kept == 0:
        mass, count, next_row, next_value = scan(values, gumbels, V, top, inverse_temperature, value, drawn, BLOCK)
        stays = fits(mass, count, value, top, total, top_p, top_k)
        drawn = tl.where(stays, drawn, next_row)
        value = tl.where(stays, value, next_value)
        kept = stays.to(tl.int32)
    return drawn
