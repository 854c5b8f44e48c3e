"""Heads of q and k: normalised and rotated, as qk_norm_rotary_append has it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_rotary(x, head, d, norm_weight, cos_sin, position, heads, D, eps):
    """rotary(rms_norm(x[head])), without a norm weight rotary(x[head]): [len(head), len(d)] float32, rounded to x's
    dtype. A lane reads its element and the neighbour that it rotates with."""
    inside = (head < heads)[:, None] & (d < D)[None, :]
    at = head[:, None] * D + d[None, :]
    own = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + (head[:, None] * D + (d ^ 1)[None, :]), mask=inside, other=0.0).to(tl.float32)
    if norm_weight is not None:
        scale = tl.rsqrt(tl.sum(own * own, 1) / D + eps)[:, None]
        own *= scale * tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        other *= scale * tl.load(norm_weight + (d ^ 1), mask=d < D, other=0.0).to(tl.float32)[None, :]
    angle = cos_sin + position * D + d // 2 * 2
    cosine = tl.load(angle, mask=d < D, other=0.0).to(tl.float32)
    sine = tl.load(angle + 1, mask=d < D, other=0.0).to(tl.float32) * tl.where(d % 2 == 0, -1.0, 1.0)
    rotated = own * cosine[None, :] + other * sine[None, :]
    return rotated.to(x.dtype.element_ty).to(tl.float32)
