"""attention_decode in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.support import launch, power_of_2, supports
from s1kernels.registry import implement

POSITIONS = 32  # that a program reads at a time
SPLITS = 16  # parts of a row's positions, however long it is: the grid of a captured graph must not depend on it


@triton.jit
def attention_decode_kernel(
    q, k_cache, v_cache, length, out, parts, T, H, G, D, S, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, POSITIONS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Softmax attention of the H/G query heads of a key/value head over a part of the positions. Mapping: a program has
    a part, a key/value head and a row. With one part `out` gets the result, else `parts` [B, H, SPLITS, D+2] float32
    gets weighted sum, top score and total weight. Memory: the part's k and v once."""
    part, g, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    members, d, p = tl.arange(0, GROUP), tl.arange(0, DIM), tl.arange(0, POSITIONS)
    heads, group = g * (H // G) + members, H // G
    real = (members < group)[:, None] & (d < D)[None, :]
    head_at = row.to(tl.int64) * H + heads
    query = tl.load(q + head_at[:, None] * D + d[None, :], mask=real, other=0.0).to(tl.float32) * scale
    cache = ((row // T).to(tl.int64) * G + g) * S * D
    count = tl.load(length + row)
    chunk = tl.cdiv(count, SPLITS)
    end = tl.minimum(count, (part + 1) * chunk)
    top = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    value = tl.zeros([GROUP, DIM], tl.float32)
    for start in range(part * chunk, end, POSITIONS):
        at = (start + p)[:, None] * D + d[None, :]
        inside = (start + p < end)[:, None] & (d < D)[None, :]
        k = tl.load(k_cache + cache + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_cache + cache + at, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(query[:, None, :] * k[None, :, :], 2)
        score = tl.where((start + p < end)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        keep = tl.exp(top - higher)
        total = total * keep + tl.sum(weight, 1)
        value = value * keep[:, None] + tl.sum(weight[:, :, None] * v[None, :, :], 1)
        top = higher
    if SPLITS == 1:
        tl.store(out + head_at[:, None] * D + d[None, :], (value / total[:, None]).to(out.dtype.element_ty), mask=real)
    else:
        to = parts + (head_at * SPLITS + part) * (D + 2)
        tl.store(to[:, None] + d[None, :], value, mask=real)
        tl.store(to + D, top, mask=members < group)
        tl.store(to + D + 1, total, mask=members < group)


@triton.jit
def merge_kernel(parts, out, D, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """out = the parts of a head merged. Mapping: a program has a head of a row."""
    head = tl.program_id(0).to(tl.int64)
    d, s = tl.arange(0, DIM), tl.arange(0, SPLITS)
    part = parts + (head * SPLITS + s) * (D + 2)
    top, total = tl.load(part + D), tl.load(part + D + 1)
    weight = tl.exp(top - tl.max(top, 0))
    value = tl.load(part[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    merged = tl.sum(value * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + head * D + d, merged.to(out.dtype.element_ty), mask=d < D)


@implement("attention_decode", backend="triton", supports=supports)
def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, out: Tensor) -> None:
    (B, H, D), (R, G, S, _) = q.shape, k_cache.shape
    splits = 1 if S <= 2 * POSITIONS else SPLITS
    dim = power_of_2(D)
    parts = torch.empty(B * H * splits * (D + 2), dtype=torch.float32, device=q.device) if splits > 1 else out
    launch(
        attention_decode_kernel, (splits, G, B), q.device, q, k_cache, v_cache, length, out, parts, max(B // R, 1), H,
        G, D, S, D**-0.5, GROUP=power_of_2(H // G), DIM=dim, POSITIONS=POSITIONS, SPLITS=splits,
    )  # fmt: skip
    if splits > 1:
        launch(merge_kernel, (B * H,), q.device, parts, out, D, DIM=dim, SPLITS=splits)
