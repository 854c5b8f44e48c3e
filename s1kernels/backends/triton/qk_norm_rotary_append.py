"""qk_norm_rotary_append in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.support import launch, power_of_2, supports
from s1kernels.registry import implement


@triton.jit
def normed(even, odd, weight, i, D, eps):
    """rms_norm of a head given by its even and odd elements; without a weight, as they are."""
    if weight is not None:
        scale = tl.rsqrt(tl.sum(even * even + odd * odd, 0) / D + eps)
        even *= scale * tl.load(weight + 2 * i, mask=2 * i < D, other=0.0).to(tl.float32)
        odd *= scale * tl.load(weight + 2 * i + 1, mask=2 * i < D, other=0.0).to(tl.float32)
    return even, odd


@triton.jit
def put(to, even, odd, i, D):
    tl.store(to + 2 * i, even.to(to.dtype.element_ty), mask=2 * i < D)
    tl.store(to + 2 * i + 1, odd.to(to.dtype.element_ty), mask=2 * i < D)


@triton.jit(do_not_specialize=["T", "S"])
def qk_norm_rotary_append_kernel(
    qkv, q_norm_weight, k_norm_weight, cos_sin, position, k_cache, v_cache, out, T, H, G, D, S, eps,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """q, k = rotary(norm(q)), rotary(norm(k)); q goes to out, k and v into the caches at `position`. Mapping: a program
    has a head of a row, a pair of neighbouring elements a lane. Memory: qkv once in and once out."""
    head, row = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, PAIRS)
    inside = 2 * i < D
    x = qkv + (row.to(tl.int64) * (H + 2 * G) + head) * D + 2 * i
    even = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(x + 1, mask=inside, other=0.0).to(tl.float32)
    here = tl.load(position + row)
    cosine = tl.load(cos_sin + here * D + 2 * i, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(cos_sin + here * D + 2 * i + 1, mask=inside, other=0.0).to(tl.float32)
    cache = (row // T).to(tl.int64) * G * S * D + here * D
    if head < H:
        even, odd = normed(even, odd, q_norm_weight, i, D, eps)
        put(out + (row.to(tl.int64) * H + head) * D, even * cosine - odd * sine, odd * cosine + even * sine, i, D)
    elif head < H + G:
        even, odd = normed(even, odd, k_norm_weight, i, D, eps)
        to = k_cache + cache + (head - H).to(tl.int64) * S * D
        put(to, even * cosine - odd * sine, odd * cosine + even * sine, i, D)
    else:
        put(v_cache + cache + (head - H - G).to(tl.int64) * S * D, even, odd, i, D)


@implement("qk_norm_rotary_append", backend="triton", supports=supports)
def qk_norm_rotary_append(
    qkv: Tensor, q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, cos_sin: Tensor, position: Tensor,
    k_cache: Tensor, v_cache: Tensor, eps: float, out: Tensor,
) -> None:  # fmt: skip
    (B, H, D), (R, G, S, _) = out.shape, k_cache.shape
    launch(
        qk_norm_rotary_append_kernel, (H + 2 * G, B), qkv.device, qkv, q_norm_weight, k_norm_weight, cos_sin, position,
        k_cache, v_cache, out, max(B // R, 1), H, G, D, S, eps, PAIRS=power_of_2(D // 2), num_warps=1,
    )  # fmt: skip
