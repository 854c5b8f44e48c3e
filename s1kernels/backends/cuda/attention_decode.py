"""attention_decode on CUDA: csrc/cuda/attention_decode.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel, Launch, multiprocessors
from s1kernels.backends.cuda.support import HALVES, ceil_div, run, supports
from s1kernels.registry import implement

_FIELDS = {
    "pointers": "q k_cache v_cache length out partial arrived q_norm_weight k_norm_weight cos_sin",
    "ints": "rows caches heads kv_heads head_dim capacity splits ahead append",
    "floats": "eps",
}
SPLIT = {
    (dim, group): Kernel("attention_decode", f"attention_decode_d{dim}_g{group}", block=256, **_FIELDS)
    for dim in (64, 128)
    for group in (1, 2, 4, 8)
}
"""(D, H/G) -> the kernel that splits the positions over blocks."""
PLAIN = Kernel("attention_decode", "attention_decode_plain", block=256, **_FIELDS)
MOST_HEAD_DIM = 256
MOST_SPLITS = 64


class Scratch:
    """Where the parts of one attention meet: partial sums, and how many have arrived. Zeroed once, and left so.

    Args:
        rows, heads, kv_heads, head_dim: the shape of q and of the cache. capacity: positions that it holds.
    """

    def __init__(
        self, rows: int, heads: int, kv_heads: int, head_dim: int, capacity: int, device: torch.device
    ) -> None:
        positions = 16 * 128 // head_dim  # of a block at a time
        # a block an SM: more parts cost more to merge than they bring
        self.splits = max(
            1, min(ceil_div(capacity, positions), ceil_div(multiprocessors(device), rows * kv_heads), MOST_SPLITS)
        )
        floats = rows * heads * self.splits * (head_dim + 2)
        self.partial = torch.empty(floats if self.splits > 1 else 0, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(rows * kv_heads, dtype=torch.int32, device=device)


def refusal(head_dim: int, heads: int, kv_heads: int, *tensors: Tensor) -> str | None:
    """Why the split kernels cannot serve, or None."""
    if (head_dim, heads // kv_heads) not in SPLIT:
        return f"head_dim {head_dim} with {heads // kv_heads} query heads a key/value head"
    if not all(tensor.dtype in HALVES and tensor.data_ptr() % 16 == 0 for tensor in tensors):
        return "not 16-bit, or not aligned to 16 bytes"
    return None


def launches(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, out: Tensor, scratch: Scratch | None = None,
    ahead: int = 0,
) -> list[Launch]:  # fmt: skip
    """The op as launches to be enqueued in this order; `ahead` is added to `length`, so that it may hold positions."""
    rows, heads, head_dim = q.shape
    caches, kv_heads, capacity, _ = k_cache.shape
    common: dict[str, Any] = dict(
        q=q, k_cache=k_cache, v_cache=v_cache, length=length, out=out, rows=rows, caches=caches, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, capacity=capacity, ahead=ahead, append=0, eps=0.0, q_norm_weight=None,
        k_norm_weight=None, cos_sin=None,
    )  # fmt: skip
    if refusal(head_dim, heads, kv_heads, q, k_cache, v_cache, out):
        launch = PLAIN.bind(q.dtype, q.device, grid=(heads, rows), partial=None, arrived=None, splits=1, **common)
        return [launch]
    scratch = scratch or Scratch(rows, heads, kv_heads, head_dim, capacity, q.device)
    return [
        SPLIT[head_dim, heads // kv_heads].bind(
            q.dtype, q.device, grid=(scratch.splits, kv_heads, rows), partial=scratch.partial, arrived=scratch.arrived,
            splits=scratch.splits, **common,
        )
    ]  # fmt: skip


def append_launches(
    qkv: Tensor, q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, cos_sin: Tensor, position: Tensor,
    k_cache: Tensor, v_cache: Tensor, eps: float, out: Tensor, scratch: Scratch,
) -> list[Launch]:  # fmt: skip
    """qk_norm_rotary_append and attention_decode over all positions up to `position` in one launch.

    Where `refusal` is None. Args as in those ops, with as many rows as caches; out: [B, H, D].
    """
    rows, heads, head_dim = out.shape
    caches, kv_heads, capacity, _ = k_cache.shape
    return [
        SPLIT[head_dim, heads // kv_heads].bind(
            qkv.dtype, qkv.device, grid=(scratch.splits, kv_heads, rows), q=qkv, k_cache=k_cache, v_cache=v_cache,
            length=position, out=out, partial=scratch.partial, arrived=scratch.arrived, q_norm_weight=q_norm_weight,
            k_norm_weight=k_norm_weight, cos_sin=cos_sin, rows=rows, caches=caches, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, capacity=capacity, splits=scratch.splits, ahead=1, append=1, eps=eps,
        )
    ]  # fmt: skip


def _supports(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor) -> str | None:
    if q.shape[2] > MOST_HEAD_DIM:
        return f"head_dim is {q.shape[2]}; the kernels take {MOST_HEAD_DIM} at most"
    return supports(q, k_cache, v_cache, length)


@implement("attention_decode", backend="cuda", supports=_supports)
def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, out: Tensor) -> None:
    run(launches(q, k_cache, v_cache, length, out), q.device)
