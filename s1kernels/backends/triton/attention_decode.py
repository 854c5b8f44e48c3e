"""attention_decode in Triton, alone or with qk_norm_rotary_append before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.pdl import let_next_start, wait_for_inputs
from s1kernels.backends.triton.rotary import norm_rotary
from s1kernels.backends.triton.support import launch, power_of_2, supports
from s1kernels.backends.triton.tuning import sizes
from s1kernels.registry import implement


@triton.jit
def load_positions(cache, first, p, d, end, D):
    """[1, len(p), len(d)] of a head's cache from position `first` on; zeros from `end` on. Its three dimensions make
    Triton keep a thread's neighbouring elements together in products with the heads of a group."""
    at = (first + p)[None, :, None] * D + d[None, None, :]
    return tl.load(cache + at, mask=(first + p < end)[None, :, None] & (d < D)[None, None, :], other=0.0)


@triton.jit(do_not_specialize=["T", "S", "ahead"])
def attention_decode_kernel(
    q, k_cache, v_cache, length, out, parts, arrived, q_norm_weight, k_norm_weight, cos_sin, T, H, G, D, S, ahead,
    scale, eps, GROUP: tl.constexpr, DIM: tl.constexpr, POSITIONS: tl.constexpr, SPLITS: tl.constexpr,
    APPEND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Softmax attention of a row's query heads over its first `length` + ahead positions. A length outside [1, S] gives
    NaN.

    With APPEND, q is qkv [B, (H+2G)*D], and the last position's k and v come from there: they go into the caches.
    Mapping: a program has a part of the positions, a key/value head and its H/G query heads, and a row; the last of
    them to finish merges the parts. parts: [B*H, SPLITS, D+2] float32, weighted sum, top score, total weight; arrived:
    [B*G] int32, zero before and after. Memory: k and v once. With APPEND and PDL, what the caches hold is read before
    earlier kernels have ended: none of this frame writes it.
    """
    let_next_start(PDL)
    if not APPEND:
        wait_for_inputs(PDL)
    part, g, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    member, d, p = tl.arange(0, GROUP), tl.arange(0, DIM), tl.arange(0, POSITIONS)
    group = H // G
    given = tl.load(length + row) + ahead
    valid = (given >= 1) & (given <= S)
    count = tl.where(valid, given, 1)
    chunk = tl.cdiv(tl.cdiv(count, SPLITS), POSITIONS) * POSITIONS
    used = tl.cdiv(count, chunk)
    newest = part == used - 1
    cache = ((row // T).to(tl.int64) * G + g) * S * D
    first = part * chunk
    cached = count
    if APPEND:
        cached = count - 1
    end = tl.minimum(tl.where(valid, cached, 0), first + chunk)
    k = load_positions(k_cache + cache, first, p, d, end, D)
    v = load_positions(v_cache + cache, first, p, d, end, D)

    top = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    value = tl.zeros([GROUP, DIM], tl.float32)
    heads = g * group + member
    real = (member < group)[:, None] & (d < D)[None, :]
    head_at = row.to(tl.int64) * H + heads
    if APPEND:
        wait_for_inputs(PDL)
        q += row.to(tl.int64) * (H + 2 * G) * D
        query = norm_rotary(q, heads, d, q_norm_weight, cos_sin, count - 1, H, D, eps) * scale
        shared = H + g + member * 0  # once for each head of the group: all that is multiplied has the same shape
        new_k = norm_rotary(q, shared, d, k_norm_weight, cos_sin, count - 1, H + G, D, eps)
        new_v = tl.load(q + (G + shared)[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        to = cache + (count - 1).to(tl.int64) * D + d[None, :] + member[:, None] * 0
        here = (member == 0)[:, None] & (d < tl.where(newest & valid, D, 0))[None, :]
        tl.store(k_cache + to, new_k.to(k_cache.dtype.element_ty), mask=here)
        tl.store(v_cache + to, new_v, mask=here)
        top = tl.where(newest, tl.sum(query * new_k, 1), top)
        total = tl.where(newest, 1.0, total)
        value = tl.where(newest, new_v.to(tl.float32), value)
    else:
        query = tl.load(q + head_at[:, None] * D + d[None, :], mask=real, other=0.0).to(tl.float32) * scale

    for start in range(first, end, POSITIONS):
        score = tl.sum(query[:, None, :] * k.to(tl.float32), 2)
        score = tl.where((start + p < end)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        keep = tl.exp(top - higher)
        total = total * keep + tl.sum(weight, 1)
        value = value * keep[:, None] + tl.sum(weight[:, :, None] * v.to(tl.float32), 1)
        top = higher
        k = load_positions(k_cache + cache, start + POSITIONS, p, d, end, D)
        v = load_positions(v_cache + cache, start + POSITIONS, p, d, end, D)

    if used == 1:
        if part == 0:
            result = tl.where(valid, value / total[:, None], float("nan"))
            tl.store(out + head_at[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=real)
    elif part < used:
        mine = parts + (head_at * SPLITS + part) * (D + 2)
        tl.store(mine[:, None] + d[None, :], value, mask=real)
        tl.store(mine + D, top, mask=member < group)
        tl.store(mine + D + 1, total, mask=member < group)
        tl.debug_barrier()  # all of the program's parts are written before it says so
        if tl.atomic_add(arrived + row * G + g, 1, sem="acq_rel") == used - 1:
            tl.store(arrived + row * G + g, 0)
            merge(parts, out, head_at, member < group, used, d, D, SPLITS)


@triton.jit
def merge(parts, out, head, real, used, d, D, SPLITS: tl.constexpr):
    """out = the parts of the real ones among some heads merged, all heads at once."""
    s = tl.arange(0, SPLITS)
    there = real[:, None] & (s < used)[None, :]
    part = parts + (head[:, None] * SPLITS + s[None, :]) * (D + 2)
    inside = there[:, :, None] & (d < D)[None, None, :]
    value = tl.load(part[:, :, None] + d[None, None, :], mask=inside, other=0.0, cache_modifier=".cg")
    top = tl.load(part + D, mask=there, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(part + D + 1, mask=there, other=0.0, cache_modifier=".cg")
    weight = tl.exp(top - tl.max(top, 1)[:, None])
    merged = tl.sum(value * weight[:, :, None], 1) / tl.sum(total * weight, 1)[:, None]
    to = out + head[:, None] * D + d[None, :]
    tl.store(to, merged.to(out.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


class Scratch:
    """Where the parts of an attention of q [B, H, D] meet, and how many have arrived. Zeroed once, and left so."""

    def __init__(self, rows: int, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
        splits = sizes(device).splits
        self.parts = torch.empty(rows * heads * splits * (head_dim + 2), dtype=torch.float32, device=device)
        self.arrived = torch.zeros(rows * kv_heads, dtype=torch.int32, device=device)


def append(
    qkv: Tensor, q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, cos_sin: Tensor, position: Tensor,
    k_cache: Tensor, v_cache: Tensor, eps: float, out: Tensor, scratch: Scratch, *, pdl: bool = False,
) -> None:  # fmt: skip
    """qk_norm_rotary_append and attention_decode over all positions up to `position` in one launch.

    Args as in those ops, with as many rows as caches; out: [B, H, D]. With `pdl` position and what the caches hold may
    be read before earlier kernels of the stream have ended.
    """
    given = (out, scratch.parts, scratch.arrived, q_norm_weight, k_norm_weight, cos_sin)
    _enqueue(qkv, k_cache, v_cache, position, *given, 1, eps, True, pdl)


@implement("attention_decode", backend="triton", supports=supports)
def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, out: Tensor) -> None:
    (B, H, D), G = q.shape, k_cache.shape[1]
    scratch = Scratch(B, H, G, D, q.device)
    _enqueue(q, k_cache, v_cache, length, out, scratch.parts, scratch.arrived, None, None, None, 0, 0.0, False, False)


def _enqueue(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, out: Tensor, parts: Tensor, arrived: Tensor,
    q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, cos_sin: Tensor | None, ahead: int, eps: float,
    appends: bool, pdl: bool,
) -> None:  # fmt: skip
    (B, H, D), (R, G, S, _), size = out.shape, k_cache.shape, sizes(q.device)
    launch(
        attention_decode_kernel, (size.splits, G, B), q.device, q, k_cache, v_cache, length, out, parts, arrived,
        q_norm_weight, k_norm_weight, cos_sin, max(B // R, 1), H, G, D, S, ahead, D**-0.5, eps,
        GROUP=power_of_2(H // G), DIM=power_of_2(D), POSITIONS=size.positions, SPLITS=size.splits, APPEND=appends,
        pdl=pdl,
    )  # fmt: skip
