"""embed_frame: a frame's text token and its codebook codes, embedded and summed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from s1kernels.contract import Arguments, Op, Result, nbytes
from s1kernels.ops._math import wide
from s1kernels.registry import define


def reference(
    tokens: Tensor,
    text_embedding: Tensor,
    codebook_embedding: Tensor,
    semantic_begin: int,
    semantic_end: int,
    scale: bool,
) -> Tensor:
    """out = text[t0] + sum_i codebook[i*K + t_(i+1)] for a semantic t0, else text[t0].

    Args:
        tokens: [B, N+1] int32; column 0 is the text token, column i+1 the code of codebook i.
        text_embedding: [Vt, C].
        codebook_embedding: [N*K, C]; codebook i owns the rows from i*K on.
        semantic_begin, semantic_end: a row is semantic if semantic_begin <= t0 <= semantic_end; others' codes are
        unread.
        scale: divide the whole sum of semantic rows by sqrt(N+1).
    Returns:
        [B, C], dtype of text_embedding.
    Raises:
        ValueError: a token or a code out of range (named); a shape differs. TypeError: a dtype differs.
    Numerics: summed and scaled in float32, rounded once.
    Source: fish_speech/models/text2semantic/llama.py, BaseTransformer.forward_generate.

    >>> text, codebooks = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    >>> reference(torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.int32), text, codebooks, 1, 1, False)
    tensor([[52.],
            [ 1.]])
    """
    main, codes = tokens[:, 0].long(), tokens[:, 1:].long()
    size = codebook_embedding.shape[0] // codes.shape[1]
    semantic = (main >= semantic_begin) & (main <= semantic_end)
    codes = torch.where(semantic[:, None], codes, 0)
    check_range("token", main[:, None], text_embedding.shape[0], 0)
    check_range("code", codes, size, 1)
    offsets = torch.arange(codes.shape[1], device=codes.device) * size
    summed = wide(text_embedding[main]) + wide(codebook_embedding[codes + offsets]).sum(1) * semantic[:, None]
    if scale:
        summed = torch.where(semantic[:, None], summed / math.sqrt(tokens.shape[1]), summed)
    return summed.to(text_embedding.dtype)


def check_range(what: str, values: Tensor, size: int, first_column: int) -> None:
    """Raise ValueError naming the first value outside [0, size)."""
    bad = ((values < 0) | (values >= size)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(
            f"embed_frame: tokens[{row}, {column + first_column}] must be a {what} in [0, {size}), "
            f"got {values[row, column].item()}; check the prompt"
        )


def check(args: Arguments) -> None:
    args.tensor("tokens", "B", "N+1", dtype=torch.int32)
    args.tensor("text_embedding", "Vt", "C")
    args.tensor("codebook_embedding", "N*K", "C")
    codebooks = args["N+1"] - 1
    holds = codebooks > 0 and args["N*K"] % codebooks == 0
    args.require(
        holds, "codebook_embedding", f"[N*K, C] with N={codebooks}", f"{args['N*K']} rows", "tokens is [B, N+1]"
    )


def results(args: Arguments) -> tuple[Result, ...]:
    return (((args["B"], args["C"]), args.text_embedding.dtype),)


def bytes_moved(args: Arguments) -> int:
    rows = args["B"] * (args["N+1"] + 1)  # read one text row and N codebook rows, write one
    return nbytes(args.tokens) + rows * args["C"] * args.text_embedding.element_size()


def inputs(make: Any, *, B: int, C: int, N: int, K: int, Vt: int, scale: bool = False) -> tuple:
    begin = Vt // 2
    tokens = torch.cat([make.ints(B, 1, high=Vt), make.ints(B, N, high=K)], dim=1)
    tokens[0, 0] = begin  # at least one semantic row
    return tokens.contiguous(), make(Vt, C), make(N * K, C), begin, Vt - 1, scale


CASES = {
    "s1": dict(B=1, C=1024, N=10, K=4096, Vt=6000),
    "s2_scaled": dict(B=1, C=2560, N=10, K=64, Vt=300, scale=True),
    "prompt": dict(B=37, C=256, N=10, K=16, Vt=60),
    "odd_scaled": dict(B=3, C=41, N=3, K=5, Vt=11, scale=True),
    "minimal": dict(B=1, C=1, N=1, K=1, Vt=2),
}

embed_frame = define(
    Op(
        "embed_frame",
        "(Tensor tokens, Tensor text_embedding, Tensor codebook_embedding, int semantic_begin, "
        "int semantic_end, bool scale, "
        "Tensor(a!) out) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
    )
)
