"""decode_frame: one whole frame: the slow step, the head and its draw, the fast transformer's codes and their draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1kernels.contract import Arguments, Op, Result, nbytes
from s1kernels.model.config import DualARConfig, Line, StackConfig
from s1kernels.model.weights import Weights, flat_shapes
from s1kernels.registry import define


def reference(
    tokens: Tensor,
    position: Tensor,
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    main_window: Tensor | None,
    fast_window: Tensor | None,
    main_noise: Tensor,
    ras_noise: Tensor | None,
    fast_noise: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    repetition_penalty: Tensor,
    top_k: Tensor,
    ids: Tensor | None,
    logit_bias: Tensor | None,
    head: Tensor,
    weights: list[Tensor],
    config: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The next frame of B sequences, and the logits that it was drawn from. The meaning is `model.dual_ar.DualAR`.

    Args:
        tokens: [B, N+1] int32, the last frame: text token and codes.
        position: [B] int32, where it stands.
        k_caches, v_caches: one [B, G, S, D] per slow layer; written at `position`.
        main_window: [B, W] int32 or None; fast_window: [B, N-1, W'] int32 or None: see `sample_token`.
        main_noise: [B, V] float32; ras_noise: [B, V] float32 or None; fast_noise: [B, N-1, K'] float32, K' <= K.
        temperature, top_p, repetition_penalty: [] float32; top_k: [] int32.
        ids: [V] int32 or None, the token that each row of `head` stands for.
        logit_bias: [V] float32 or None, added to the main logits.
        head: [V, C], the rows of the head that can be sampled.
        weights: `Weights.flat()`.
        config: `DualARConfig.to_json()`.
    Returns:
        codes [B, N+1] int32: token, its code, and N-1 codes; main_logits [B, V] and fast_logits [B, N-1, K'] float32.
    Raises:
        ValueError: a token, code or position out of range; a shape differs. TypeError: a dtype differs.
    Numerics: that of the ops it is made of: every op's result is rounded once to the model's dtype.
    Source: fish_speech/models/text2semantic/inference.py, decode_one_token_ar. Unlike there, fast positions 0 and 1
        run as one pass, and the code of a token past the semantic range is clamped (as upstream's 2.0 line does).
    """
    from s1kernels.model.dual_ar import DualAR
    from s1kernels.ops import references

    shape = DualARConfig.from_json(config)
    return DualAR(shape, Weights.unflatten(shape, weights), references).decode_frame(
        tokens,
        position,
        k_caches,
        v_caches,
        main_window,
        fast_window,
        main_noise,
        ras_noise,
        fast_noise,
        temperature,
        top_p,
        repetition_penalty,
        top_k,
        ids,
        logit_bias,
        head,
    )


def check(args: Arguments) -> None:
    shape = DualARConfig.from_json(args.config)
    args.tensor("head", "V", shape.slow.dim)
    wide = torch.promote_types(args.head.dtype, torch.float32)
    args.tensor("tokens", "B", shape.codebooks + 1, dtype=torch.int32)
    args.tensor("position", "B", dtype=torch.int32)
    args.optional("main_window", "B", "W", dtype=torch.int32)
    args.optional("fast_window", "B", shape.codebooks - 1, "W'", dtype=torch.int32)
    args.tensor("main_noise", "B", "V", dtype=wide)
    args.optional("ras_noise", "B", "V", dtype=wide)
    args.tensor("fast_noise", "B", shape.codebooks - 1, "K'", dtype=wide)
    args.optional("ids", "V", dtype=torch.int32)
    args.optional("logit_bias", "V", dtype=wide)
    for name in ("temperature", "top_p", "repetition_penalty"):
        args.tensor(name, dtype=wide)
    args.tensor("top_k", dtype=torch.int32)
    fits = 1 <= args["K'"] <= shape.codebook_size
    args.require(
        fits,
        "fast_noise",
        f"[B, N-1, K'] with K' in [1, {shape.codebook_size}]",
        args["K'"],
        "see DualARConfig.fast_rows",
    )
    capacity = args.k_caches[0].shape[2] if args.k_caches else 0
    cache = (args["B"], shape.slow.kv_heads, capacity, shape.slow.head_dim)
    caches = [cache] * shape.slow.layers
    for name, shapes in (("k_caches", caches), ("v_caches", caches), ("weights", flat_shapes(shape))):
        tensors = getattr(args, name)
        args.require(len(tensors) == len(shapes), name, f"{len(shapes)} tensors", len(tensors), "see Weights.flat()")
        for i, (tensor, size) in enumerate(zip(tensors, shapes, strict=True)):
            args.replace(f"{name}[{i}]", tensor)
            args.tensor(f"{name}[{i}]", *size)


def results(args: Arguments) -> tuple[Result, ...]:
    return tuple((tuple(like.shape), like.dtype) for like in (args.tokens, args.main_noise, args.fast_noise))


def bytes_moved(args: Arguments) -> int:
    """Layer weights once a pass (the fast stack makes N-1), heads, one frame's embeddings, and the cache so far."""
    shape = DualARConfig.from_json(args.config)
    weights = Weights.unflatten(shape, args.weights)
    size, rows = args.head.element_size(), args["B"]

    def layers(stack: StackConfig, tensors: list) -> int:
        return nbytes(*(t for layer in tensors for t in vars(layer).values()))

    passes = shape.codebooks - 1
    fast = passes * (layers(shape.fast, weights.fast) + args["K'"] * shape.fast.dim * size)
    kept = int(args.position.sum() + rows) * 2 * shape.slow.layers * shape.slow.kv_heads * shape.slow.head_dim * size
    embedding = rows * ((shape.codebooks + 1) * shape.slow.dim + shape.codebooks * shape.fast.dim) * size
    projection = nbytes(weights.project_weight, weights.project_bias)
    return (
        layers(shape.slow, weights.slow)
        + nbytes(args.head, args.main_noise, args.fast_noise)
        + fast
        + kept
        + embedding
        + projection
    )


def inputs(
    make: Any,
    *,
    B: int,
    slow: StackConfig,
    fast: StackConfig,
    V: int,
    N: int,
    K: int,
    start: int,
    line: Line = "s1",
    ras: bool = False,
    ids: bool = False,
    tied: bool = False,
    norm_fast_input: bool = False,
) -> tuple:
    """A random model whose draws are forced (see `force`), so that codes must agree in every dtype."""
    vocab = 3 * V
    shape = DualARConfig(
        slow=slow, fast=fast, vocab_size=vocab, codebooks=N, codebook_size=K, max_positions=start + 9, norm_eps=1e-6,
        rope_base=1e4, tie_embeddings=tied, scale_codebook_embeddings=ras, norm_fast_input=norm_fast_input,
        semantic_begin=V,
        semantic_end=V + K - 1, end_token=0, line=line,
    )  # fmt: skip
    weights = Weights.build(shape, lambda key, size: make(*size, scale=size[-1] ** -0.5 if len(size) > 1 else 1.0))
    tokens = torch.cat([make.ints(B, 1, low=V, high=V + K), make.ints(B, N, high=K)], dim=1).contiguous()
    position = make.ints(B, low=start, high=start + 3)
    caches = [[make(B, slow.kv_heads, start + 5, slow.head_dim) for _ in range(slow.layers)] for _ in range(2)]
    rows = make.ints(V, low=1, high=4).cumsum(0).int() if ids else None
    main_noise, fast_noise = make.exponential(B, V), make.exponential(B, N - 1, min(K, shape.fast_rows))
    ras_noise = make.exponential(B, V) if ras else None
    for noise in (main_noise, fast_noise, *([] if ras_noise is None else [ras_noise])):
        force(noise, make.ints(*noise.shape[:-1], high=noise.shape[-1]))
    window = make.ints(B, 10, low=V, high=V + K)
    if ras:  # the forced draw of row 0 is in its window: it must be drawn again
        window[0, 3] = main_noise[0].argmin() if rows is None else rows[main_noise[0].argmin()]
    scalars = make.scalar(0.7), make.scalar(1.0), make.scalar(1.2), make.scalar(0, torch.int32)
    bias = make(V, dtype=torch.float32) if ras else None
    head = (weights.head if rows is None else weights.head[rows.long()])[:V].contiguous()
    return (
        tokens, position, *caches, window, None if ras else make.ints(B, N - 1, 16, high=K), main_noise, ras_noise,
        fast_noise, *scalars, rows, bias, head, weights.flat(), shape.to_json(),
    )  # fmt: skip


def force(noise: Tensor, index: Tensor) -> None:
    """Make draws from `noise` [..., V] choose `index` [...] whatever the logits (if top_p and top_k keep it)."""
    noise.fill_(1e30).scatter_(-1, index.long()[..., None], 1e-5)


_SLOW = StackConfig(layers=3, dim=48, heads=6, kv_heads=2, head_dim=16, intermediate=72, qk_norm=True)
_FAST = StackConfig(layers=2, dim=48, heads=4, kv_heads=4, head_dim=10, intermediate=40)
_BIASED = StackConfig(
    layers=2, dim=36, heads=4, kv_heads=1, head_dim=8, intermediate=33, qkv_bias=True, o_bias=True, qk_norm=True
)

CASES = {
    "s1_layers": dict(
        B=1, V=4097, N=3, K=1024, start=200,
        slow=StackConfig(layers=2, dim=1024, heads=16, kv_heads=8, head_dim=128, intermediate=3072, qk_norm=True),
        fast=StackConfig(layers=2, dim=1024, heads=16, kv_heads=8, head_dim=64, intermediate=3072),
    ),
    "s1_small": dict(B=1, slow=_SLOW, fast=_FAST, V=99, N=4, K=20, start=0),
    "s1_tied_batch": dict(B=3, slow=_SLOW, fast=_FAST, V=99, N=5, K=20, start=7, tied=True),
    "s2_projected": dict(B=1, slow=_SLOW, fast=_BIASED, V=99, N=4, K=20, start=3, line="2.0", ras=True, ids=True,
                         norm_fast_input=True),
    "s2_biased_batch": dict(B=2, slow=_BIASED, fast=_FAST, V=70, N=2, K=20, start=5, line="2.0", ras=True, tied=True),
}  # fmt: skip

decode_frame = define(
    Op(
        "decode_frame",
        "(Tensor tokens, Tensor position, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor? main_window, "
        "Tensor? fast_window, Tensor main_noise, Tensor? ras_noise, Tensor fast_noise, Tensor temperature, "
        "Tensor top_p, Tensor repetition_penalty, Tensor top_k, Tensor? ids, Tensor? logit_bias, Tensor head, "
        "Tensor[] weights, str config, "
        "Tensor(c!) out_codes, Tensor(d!) out_main_logits, Tensor(e!) out_fast_logits) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
        # a frame rounds some six times a layer, and errors add up along it
        tolerance={torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3},
    )
)
