"""Heads of q and k: normalised and rotated, as qk_norm_rotary_append has it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pairs(x):
    """The even and the odd columns of x [n, m]."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def norm_rotary(x, head, d, norm_weight, cos_sin, position, heads, D, eps):
    """rotary(rms_norm(x[head])), without a norm weight rotary(x[head]): [len(head), len(d)] float32, rounded to x's
    dtype. Everything is loaded in one shape, so that a lane has what it multiplies and the pair that rotates."""
    shape: tl.constexpr = (head.shape[0], d.shape[0])
    columns = tl.broadcast_to(d[None, :], shape)
    inside = columns < D
    v = tl.load(x + head[:, None] * D + columns, mask=(head < heads)[:, None] & inside, other=0.0).to(tl.float32)
    if norm_weight is not None:
        scale = tl.rsqrt(tl.sum(v * v, 1) / D + eps)[:, None]
        v *= scale * tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
    even, odd = pairs(v)
    cosine, sine = pairs(tl.load(cos_sin + position * D + columns, mask=inside, other=0.0).to(tl.float32))
    rotated = tl.reshape(tl.join(even * cosine - odd * sine, odd * cosine + even * sine), shape)
    return rotated.to(x.dtype.element_ty).to(tl.float32)
