"""qk_norm_rotary_append: per-head norm of q and k, rotary embedding, and the write of k and v into the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1kernels.contract import Arguments, Op, Result, nbytes
from s1kernels.ops._math import normalize, wide
from s1kernels.registry import define


def reference(
    qkv: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    cos_sin: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    eps: float,
) -> Tensor:
    """q, k = rotary(norm(q), position), rotary(norm(k), position); k_cache[:, :, position] = k; v likewise; out = q.

    The rotary embedding is interleaved: with (c, s) = cos_sin[position, i], the pair (a, b) = (q[2i], q[2i+1]) becomes
    (a*c - b*s, b*c + a*s).

    Args:
        qkv: [B, (H + 2G) * D]; q | k | v, head by head.
        q_norm_weight, k_norm_weight: [D] RMSNorm weights over each head, or None for no norm.
        cos_sin: [P, D/2, 2], the model's own table (upstream rounds it to bfloat16; it is used as it is).
        position: [B] int32; where each row stands, and where its k and v are written.
        k_cache, v_cache: [R, G, S, D]; written. B = R*T, and row b belongs to cache b // T.
        eps: added to the mean square of a head.
    Returns:
        [B, H, D], dtype of qkv.
    Raises:
        ValueError: a position outside the cache or the table (where the host can see it); a shape differs.
        TypeError: a dtype differs.
    Numerics: norm and rotation in float32, rounded once.
    Source: fish_speech/models/text2semantic/llama.py, Attention.forward, apply_rotary_emb, KVCache.update.

    >>> cache = torch.zeros(2, 1, 1, 1, 2)
    >>> reference(torch.arange(6.0)[None], None, None, torch.tensor([[[0.0, 1.0]]]), torch.tensor([0]), *cache, 1e-6)
    tensor([[[-1.,  0.]]])
    >>> cache.flatten()
    tensor([-3.,  2.,  4.,  5.])
    """
    (caches, kv_heads, capacity, head_dim), rows = k_cache.shape, qkv.shape[0]
    limit = min(capacity, cos_sin.shape[0])
    if bool(((position < 0) | (position >= limit)).any()):
        raise ValueError(
            f"qk_norm_rotary_append: position must be in [0, {limit}), got {position.tolist()}; grow the cache first"
        )
    q, k, v = qkv.view(rows, -1, head_dim).split([qkv.shape[1] // head_dim - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    angle = wide(cos_sin[position.long()])[:, None]
    row = torch.arange(caches, device=qkv.device).repeat_interleave(rows // caches)
    k_cache[row, :, position.long()] = _rotate(normalize(k, k_norm_weight, eps), angle).to(qkv.dtype)
    v_cache[row, :, position.long()] = v
    return _rotate(normalize(q, q_norm_weight, eps), angle).to(qkv.dtype)


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    a, b, c, s = x[..., 0::2], x[..., 1::2], angle[..., 0], angle[..., 1]
    return torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2)


def check(args: Arguments) -> None:
    args.tensor("qkv", "B", "(H+2G)*D")
    args.tensor("k_cache", "R", "G", "S", "D")
    args.tensor("v_cache", "R", "G", "S", "D")
    args.optional("q_norm_weight", "D")
    args.optional("k_norm_weight", "D")
    kv_heads, head_dim = args["G"], args["D"]
    args.require(head_dim % 2 == 0, "k_cache", "[R, G, S, D] with an even D", f"D={head_dim}", "rotary needs pairs")
    args.tensor("cos_sin", "P", head_dim // 2, 2)
    args.tensor("position", "B", dtype=torch.int32)
    heads = args["(H+2G)*D"] // head_dim
    fits = args["(H+2G)*D"] % head_dim == 0 and heads > 2 * kv_heads and heads % kv_heads == 0
    expected = f"[B, (H+2G)*D] with G={kv_heads}, D={head_dim}"
    args.require(fits, "qkv", expected, list(args.qkv.shape), "H must be a multiple of G")
    args.require(
        args["B"] % args["R"] == 0, "qkv", f"[R*T, ...] with R={args['R']}", list(args.qkv.shape), "same T for all"
    )


def results(args: Arguments) -> tuple[Result, ...]:
    return (((args["B"], args["(H+2G)*D"] // args["D"] - 2 * args["G"], args["D"]), args.qkv.dtype),)


def bytes_moved(args: Arguments) -> int:
    angles = args["B"] * args["D"] * args.cos_sin.element_size()
    return 2 * nbytes(args.qkv) + nbytes(args.q_norm_weight, args.k_norm_weight, args.position) + angles


def inputs(make: Any, *, B: int, R: int, H: int, G: int, D: int, S: int, norm: bool = True) -> tuple:
    weights = (make(D), make(D)) if norm else (None, None)
    start = make.ints(R, 1, high=S - B // R + 1)
    position = (start + torch.arange(B // R, device=start.device, dtype=torch.int32)).reshape(B)
    caches = make(R, G, S, D), make(R, G, S, D)
    return make(B, (H + 2 * G) * D), *weights, make(S + 3, D // 2, 2), position, *caches, 1e-6


CASES = {
    "s1_slow": dict(B=1, R=1, H=16, G=8, D=128, S=512),
    "s1_fast_pair": dict(B=2, R=1, H=16, G=8, D=64, S=10, norm=False),
    "prompt": dict(B=19, R=1, H=4, G=2, D=32, S=40),
    "batch_8": dict(B=8, R=8, H=4, G=4, D=16, S=9),
    "odd": dict(B=6, R=3, H=3, G=1, D=10, S=7),
    "minimal": dict(B=1, R=1, H=1, G=1, D=2, S=1, norm=False),
}

qk_norm_rotary_append = define(
    Op(
        "qk_norm_rotary_append",
        "(Tensor qkv, Tensor? q_norm_weight, Tensor? k_norm_weight, Tensor cos_sin, Tensor position, "
        "Tensor(a!) k_cache, Tensor(b!) v_cache, float eps, Tensor(c!) out) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
    )
)
