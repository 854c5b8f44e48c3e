"""Attention of the fast stack and its projection in one launch, for the few positions that it has."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.cuda.support import ceil_div
from s1kernels.backends.triton.pdl import let_next_start, wait_for_inputs
from s1kernels.backends.triton.project import load_vector, my_outs, store
from s1kernels.backends.triton.rotary import norm_rotary
from s1kernels.backends.triton.support import launch, power_of_2
from s1kernels.backends.triton.tuning import sizes

MOST_CACHED = 1 << 15  # elements of k, and of v, that a program of 8 warps holds: 64 KB of 16-bit values


@triton.jit
def attend(query, key, value, top, total, sums):
    """One position more in a softmax sum of heads [H]."""
    score = tl.sum(query * key, 1)
    higher = tl.maximum(top, score)
    keep, weight = tl.exp(top - higher), tl.exp(score - higher)
    return higher, total * keep + weight, sums * keep[:, None] + value * weight[:, None]


@triton.jit(do_not_specialize=["first"])
def attention_output_kernel(
    qkv, k_cache, v_cache, q_norm_weight, k_norm_weight, cos_sin, weight, bias, residual, out, B, first, H, G, D, S,
    width, scale, eps, T: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_O: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = weight @ attention(qkv) + bias + residual, for T new positions first ... first+T-1 of B sequences.

    qkv [B*T, (H+2G)*D]; k_cache, v_cache [B, G, S, D], at most POSITIONS of them used; weight [C, H*D]; residual and
    out [B*T, C], which may be the same. Mapping: a program has BLOCK_O rows of the weight, and computes all of the
    attention itself: ten positions are 20 KB from L2, less than a launch costs. The first writes the new k and v. What
    earlier passes wrote to the caches is read before the program waits: the draw between two passes lets no later
    kernel start before all earlier ones have ended.
    Memory: the weight once. Numerics: q, k and the attention's result are rounded as by the ops that this replaces.
    """
    let_next_start(PDL)
    outs, h, d, p = my_outs(BLOCK_O), tl.arange(0, HEADS), tl.arange(0, DIM), tl.arange(0, POSITIONS)
    inside = (h < H)[:, None] & (d < D)[None, :]
    columns = h[:, None] * D + d[None, :]
    tile = tl.load(
        weight + outs.to(tl.int64)[:, None, None] * (H * D) + columns[None, :, :],
        mask=(outs < width)[:, None, None] & inside[None, :, :], other=0.0,
    )  # fmt: skip
    if bias is not None:
        plus = load_vector(bias, outs, width)
    group, row_size = H // G, (H + 2 * G) * D
    kv = tl.minimum(h // group, G - 1)
    cached_at = kv[:, None, None] * (S * D) + p[None, :, None] * D + d[None, None, :]
    cached = inside[:, None, :] & (p < first)[None, :, None]
    k = tl.load(k_cache + cached_at, mask=cached, other=0.0)
    v = tl.load(v_cache + cached_at, mask=cached, other=0.0)
    wait_for_inputs(PDL)
    for b in range(B):
        for t in tl.static_range(T):
            query = norm_rotary(qkv + t * row_size, h, d, q_norm_weight, cos_sin, first + t, H, D, eps) * scale
            top = tl.full([HEADS], float("-inf"), tl.float32)
            total = tl.zeros([HEADS], tl.float32)
            sums = tl.zeros([HEADS, DIM], tl.float32)
            for u in tl.static_range(t + 1):
                row = qkv + u * row_size
                new_k = norm_rotary(row, H + kv, d, k_norm_weight, cos_sin, first + u, H + G, D, eps)
                new_v = tl.load(row + (H + G + kv)[:, None] * D + d[None, :], mask=inside, other=0.0)
                top, total, sums = attend(query, new_k, new_v.to(tl.float32), top, total, sums)
                if u == t and tl.program_id(0) == 0:
                    to = kv[:, None] * (S * D) + (first + t) * D + d[None, :]
                    once = inside & (h % group == 0)[:, None]
                    tl.store(k_cache + to, new_k.to(k_cache.dtype.element_ty), mask=once)
                    tl.store(v_cache + to, new_v, mask=once)
            score = tl.sum(query[:, None, :] * k.to(tl.float32), 2)
            score = tl.where((p < first)[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            keep, weights = tl.exp(top - higher), tl.exp(score - higher[:, None])
            total = total * keep + tl.sum(weights, 1)
            sums = sums * keep[:, None] + tl.sum(weights[:, :, None] * v.to(tl.float32), 1)
            attended = (sums / total[:, None]).to(qkv.dtype.element_ty).to(tl.float32)
            y = tl.sum(tl.sum(tile.to(tl.float32) * attended[None, :, :], 2), 1)
            y += load_vector(residual + t * width, outs, width)
            if bias is not None:
                y += plus
            store(out + t * width, outs, width, y)
        qkv += T * row_size
        k_cache += G * S * D
        v_cache += G * S * D
        more = inside[:, None, :] & (p < tl.where(b + 1 < B, first, 0))[None, :, None]
        k = tl.load(k_cache + cached_at, mask=more, other=0.0)
        v = tl.load(v_cache + cached_at, mask=more, other=0.0)
        residual += T * width
        out += T * width


def fits(heads: int, head_dim: int, positions: int) -> bool:
    """Whether a program holds keys and values of so many positions."""
    return power_of_2(heads) * power_of_2(head_dim) * power_of_2(positions) <= MOST_CACHED


def enqueue(
    qkv: Tensor, q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, cos_sin: Tensor, first: int,
    k_cache: Tensor, v_cache: Tensor, eps: float, weight: Tensor, bias: Tensor | None, x: Tensor, *, heads: int,
    pdl: bool = False,
) -> None:  # fmt: skip
    """x [B*T, C] += weight @ attention(qkv) + bias. With `pdl` the weight and the bias may be read before earlier
    kernels of the stream have ended."""
    (B, G, S, D), width = k_cache.shape, weight.shape[0]
    block_o = min(max(1, sizes(x.device).output_tile // (power_of_2(heads) * power_of_2(D))), power_of_2(width))
    launch(
        attention_output_kernel, (ceil_div(width, block_o),), qkv.device, qkv, k_cache, v_cache, q_norm_weight,
        k_norm_weight, cos_sin, weight, bias, x, x, B, first, heads, G, D, S, width, D**-0.5, eps, T=qkv.shape[0] // B,
        HEADS=power_of_2(heads), DIM=power_of_2(D), POSITIONS=power_of_2(S), BLOCK_O=block_o, pdl=pdl, num_warps=8,
    )  # fmt: skip
