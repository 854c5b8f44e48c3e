"""attention_decode: grouped-query attention of new positions over the part of the cache that exists."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from s1kernels.contract import Arguments, Op, Result, nbytes
from s1kernels.ops._math import wide
from s1kernels.registry import define


def reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor) -> Tensor:
    """out = softmax(q @ k.T / sqrt(D)) @ v over the first `length` positions; query head h reads kv head h // (H/G).

    Args:
        q: [B, H, D].
        k_cache, v_cache: [R, G, S, D]. B = R*T, and row b belongs to cache b // T; nothing past its length is read.
        length: [B] int32, positions that row b sees, at least 1. Lives on the device, like the caches.
    Returns:
        [B, H, D], dtype of q.
    Raises:
        ValueError: a length outside [1, S] (where the host can see it); a shape differs. TypeError: a dtype differs.
    Numerics: scores, softmax and sums in float32, rounded once.
    Source: fish_speech/models/text2semantic/llama.py, Attention.forward.

    >>> k_cache, v_cache = torch.zeros(1, 1, 3, 2), torch.tensor([[[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]])
    >>> reference(torch.ones(1, 1, 2), k_cache, v_cache, torch.tensor([2], dtype=torch.int32))
    tensor([[[2., 3.]]])
    """
    (rows, heads, head_dim), (caches, kv_heads, capacity, _) = q.shape, k_cache.shape
    lengths = length.tolist()
    if not all(1 <= n <= capacity for n in lengths):
        raise ValueError(f"attention_decode: length must be in [1, {capacity}], got {lengths}; append k and v first")
    out = torch.empty_like(q)
    for b, n in enumerate(lengths):
        k, v = (wide(cache[b // (rows // caches), :, :n]) for cache in (k_cache, v_cache))
        grouped = wide(q[b]).view(kv_heads, heads // kv_heads, head_dim)
        weights = torch.softmax(grouped @ k.transpose(1, 2) / math.sqrt(head_dim), dim=-1)
        out[b] = (weights @ v).reshape(heads, head_dim).to(q.dtype)
    return out


def check(args: Arguments) -> None:
    args.tensor("q", "B", "H", "D")
    args.tensor("k_cache", "R", "G", "S", "D")
    args.tensor("v_cache", "R", "G", "S", "D")
    args.tensor("length", "B", dtype=torch.int32)
    shape = list(args.q.shape)
    args.require(
        args["H"] % args["G"] == 0, "q", f"[B, H, D] with H a multiple of G={args['G']}", shape, "check the model"
    )
    args.require(args["B"] % args["R"] == 0, "q", f"[R*T, H, D] with R={args['R']}", shape, "same T for all caches")


def results(args: Arguments) -> tuple[Result, ...]:
    return ((tuple(args.q.shape), args.q.dtype),)


def bytes_moved(args: Arguments) -> int:
    position = 2 * args["G"] * args["D"] * args.k_cache.element_size()
    longest = args.length.view(args["R"], -1).amax(1)  # the rows of one cache share its reads
    return 2 * nbytes(args.q) + nbytes(args.length) + int(longest.sum()) * position


def inputs(make: Any, *, B: int, R: int, H: int, G: int, D: int, S: int, length: int | None = None) -> tuple:
    lengths = make.ints(B, low=1, high=S + 1) if length is None else torch.full((B,), length, dtype=torch.int32)
    k_cache, v_cache = make(R, G, S, D), make(R, G, S, D)
    for r, longest in enumerate(lengths.view(R, -1).amax(1).tolist()):
        k_cache[r, :, longest:] = v_cache[r, :, longest:] = float("nan")
    return make(B, H, D), k_cache, v_cache, lengths.to(k_cache.device)


CASES = {
    "s1_slow_512": dict(B=1, R=1, H=16, G=8, D=128, S=640, length=512),
    "s1_slow_first": dict(B=1, R=1, H=16, G=8, D=128, S=512, length=1),
    "s1_fast_pair": dict(B=2, R=1, H=16, G=8, D=64, S=10),
    "s1_fast_last": dict(B=1, R=1, H=16, G=8, D=64, S=10, length=10),
    "batch_8": dict(B=8, R=8, H=4, G=4, D=16, S=33),
    "odd": dict(B=6, R=3, H=9, G=3, D=10, S=7),
    "past_a_block": dict(B=1, R=1, H=2, G=1, D=66, S=129, length=129),
    "minimal": dict(B=1, R=1, H=1, G=1, D=2, S=1),
}

attention_decode = define(
    Op(
        "attention_decode",
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor length, Tensor(a!) out) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
    )
)
