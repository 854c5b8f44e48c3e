"""The models that are timed: S1-mini's shape, seeded random weights; the past that they go on from, and the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s1kernels import Engine
from s1kernels.cli import demo
from s1kernels.model.config import DualARConfig, from_upstream
from s1kernels.model.weights import Weights
from s1kernels.testing import rel_error

END = 0  # the end token: its logit is 0, which is outside the nucleus of these random logits
FORCED = 3  # frames whose logits are compared
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative error of the main logits that a system may have: twice what upstream's own rounding leaves at S1-mini's
depth (1.4e-2 in bfloat16, by bench_frame.py), and as much for dtypes with more digits."""


def config(small: bool, positions: int) -> DualARConfig:
    """S1-mini's shape, or one with fewer layers and a smaller vocabulary, for so many positions."""
    shape = demo.SMALL if small else demo.S1_MINI
    vocab = int(shape["vocab_size"])
    return from_upstream(
        shape | {"model_type": "dual_ar", "max_seq_len": positions},
        semantic_begin=vocab - 4096, semantic_end=vocab - 1, end_token=END, line="s1",
    )  # fmt: skip


def describe(shape: DualARConfig) -> str:
    """A model in a sentence."""
    layers, vocab = f"{shape.slow.layers} slow and {shape.fast.layers} fast layers", f"{shape.vocab_size:,} tokens"
    return f"S1-mini's widths, {layers}, {vocab}; seeded random weights"


def weights(shape: DualARConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Seeded random weights that keep activations near 1."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(key: str, size: tuple[int, ...]) -> Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=dtype, device=device)
        return torch.empty(size, dtype=dtype, device=device).normal_(0, size[-1] ** -0.5, generator=generator)

    made = Weights.build(shape, draw)
    made.head[END] = 0
    return made


def prompt(shape: DualARConfig, length: int, device: torch.device) -> Tensor:
    """[N+1, length] int32 frames of semantic tokens."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, min(1024, shape.codebook_size), (shape.codebooks, length), generator=generator)
    return torch.cat([codes[:1] + shape.semantic_begin, codes]).to(device, torch.int32)


@dataclass(frozen=True)
class Yardstick:
    """What systems go on from and are held to: the reference in float64 on the same weights.

    text: [N+1, P] the frames; the past of a context of n positions are the first n.
    k, v: its caches over all of them, in float32. logits: context -> [FORCED, V] of the frames at n ... n+FORCED-1.
    """

    text: Tensor
    k: list[Tensor]
    v: list[Tensor]
    logits: dict[int, Tensor]

    @staticmethod
    @torch.inference_mode()
    def measure(shape: DualARConfig, given: Weights, contexts: list[int]) -> Yardstick:
        text = prompt(shape, max(contexts) + FORCED, given.norm.device)
        engine = Engine(shape, given.to(torch.float64), backend="reference")
        engine.prefill(text)
        steps = {n: [engine.slow_step(text[:, t : t + 1], t)[0] for t in range(n, n + FORCED)] for n in contexts}
        k, v = ([c[:, :, : text.shape[1]].float() for c in of] for of in (engine.cache.k, engine.cache.v))
        return Yardstick(text, k, v, {n: torch.cat(logits) for n, logits in steps.items()})

    def error(self, context: int, logits: Tensor) -> float:
        """The relative error of a system's logits [FORCED, V]."""
        return rel_error(logits.flatten(), self.logits[context].flatten())
