"""embed_frame on CUDA: csrc/cuda/embed_frame.cu."""

from __future__ import annotations

from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel, Launch
from s1kernels.backends.cuda.support import ceil_div, run, supports
from s1kernels.registry import implement

THREADS = 128
KERNEL = Kernel(
    "embed_frame", "embed_frame", block=THREADS,
    pointers="tokens text_embedding codebook_embedding out",
    ints="codebooks codebook_size dim text_rows semantic_begin semantic_end", floats="scale",
)  # fmt: skip


def launches(
    tokens: Tensor, text_embedding: Tensor, codebook_embedding: Tensor, semantic_begin: int, semantic_end: int,
    scale: bool, out: Tensor, *, pdl: bool = True,
) -> list[Launch]:  # fmt: skip
    """The op as launches to be enqueued in this order."""
    (rows, columns), dim = tokens.shape, out.shape[1]
    if rows == 0:
        return []
    return [
        KERNEL.bind(
            out.dtype, out.device, grid=(rows, ceil_div(dim * out.element_size(), 16 * THREADS)), pdl=pdl,
            tokens=tokens, text_embedding=text_embedding, codebook_embedding=codebook_embedding, out=out,
            codebooks=columns - 1, codebook_size=codebook_embedding.shape[0] // (columns - 1), dim=dim,
            text_rows=text_embedding.shape[0], semantic_begin=semantic_begin, semantic_end=semantic_end,
            scale=columns**-0.5 if scale else 1.0,
        )
    ]  # fmt: skip


@implement("embed_frame", backend="cuda", supports=supports)
def embed_frame(
    tokens: Tensor, text_embedding: Tensor, codebook_embedding: Tensor, semantic_begin: int, semantic_end: int,
    scale: bool, out: Tensor,
) -> None:  # fmt: skip
    run(launches(tokens, text_embedding, codebook_embedding, semantic_begin, semantic_end, scale, out), out.device)
