"""decode_frame in Triton: the ops' kernels in a row, with the fast stack's attention inside its projection."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1kernels import frame_graph
from s1kernels.backends.triton import (
    attention_decode,
    attention_output,
    embed_frame,
    linear_residual,
    rms_norm_logits,
    rms_norm_qkv,
    rms_norm_swiglu,
    sample_token,
)
from s1kernels.backends.triton.pdl import wait_for_inputs
from s1kernels.backends.triton.qk_norm_rotary_append import qk_norm_rotary_append
from s1kernels.backends.triton.support import launch, power_of_2, programmatic, supports
from s1kernels.cache import KVCache
from s1kernels.decoder import Decoder, HostDecoder
from s1kernels.draws import Randomness
from s1kernels.model.config import DualARConfig, StackConfig
from s1kernels.model.weights import LayerWeights, Weights
from s1kernels.registry import implement
from s1kernels.sampling import Rows


@triton.jit(do_not_specialize=["numbers"])
def advance_kernel(
    tokens, codes, position, window, index, random, N, W, numbers, FILLS_FIRST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """After a frame, the state that the next one starts from; `FrameGraph` keeps it. Mapping: one program.

    tokens [N+1] receives codes [N+1]; window [N+1, W] remembers them, as `s1kernels.sampling.remember` does
    (FILLS_FIRST in the S1 line), unless index [1] is -1: the frame after a prompt. random [2] int64: seed, and offset,
    which moves on by `numbers`.
    """
    wait_for_inputs(PDL)
    r, w = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (r <= N) & (w < W)
    count = tl.load(index)
    code = tl.load(codes + r, mask=r <= N)
    now = tl.load(window + r * W + w, mask=inside)
    said = tl.where(w == W - 1, code, tl.load(window + r * W + w + 1, mask=inside & (w + 1 < W)))
    if FILLS_FIRST:
        said = tl.where(count < W, tl.where(w == count, code, now), said)
    here, offset = tl.load(position), tl.load(random + 1)
    tl.debug_barrier()  # all has been read
    tl.store(window + r * W + w, tl.where(count < 0, 0, said), mask=inside)
    tl.store(tokens + r, code, mask=r <= N)
    tl.store(index, count + 1)
    tl.store(position, here + 1)
    tl.store(random + 1, offset + numbers)


class Buffers:
    """What a frame of B sequences keeps between its kernels."""

    def __init__(self, config: DualARConfig, rows: int, like: Tensor) -> None:
        slow, fast = config.slow, config.fast
        self.x, self.normed = (like.new_empty(rows, slow.dim) for _ in range(2))
        self.projected = like.new_empty(rows, fast.dim) if config.projects else None
        self.fast_x = like.new_empty(2 * rows, fast.dim)
        self.slow_stack, self.fast_stack = StackBuffers(slow, rows, like), StackBuffers(fast, 2 * rows, like)
        self.scratch = attention_decode.Scratch(rows, slow.heads, slow.kv_heads, slow.head_dim, like.device)
        cache = (rows, fast.kv_heads, config.codebooks, fast.head_dim)
        self.fast_k, self.fast_v = ([like.new_empty(cache) for _ in range(fast.layers)] for _ in range(2))


class StackBuffers:
    """What a layer keeps between its kernels, for up to `rows` rows."""

    def __init__(self, stack: StackConfig, rows: int, like: Tensor) -> None:
        self.qkv, self.attended = (
            like.new_empty(rows, stack.qkv_rows),
            like.new_empty(rows, stack.heads, stack.head_dim),
        )
        self.q, self.gated = torch.empty_like(self.attended), like.new_empty(rows, stack.intermediate)


class Frame:
    """A model bound to the kernels.

    Args:
        config, weights: the model; the weights are used where they lie and kept alive.
        head: [V, C], the rows of the head that are sampled.
        fast_rows: K', rows of the fast head that are sampled.
    Raises:
        ValueError: a weight is not contiguous or has another dtype or device than the head.
    """

    def __init__(self, config: DualARConfig, weights: Weights, head: Tensor, fast_rows: int) -> None:
        weights.require_like(head)
        self.config, self.weights, self.head, self.fast_rows = config, weights, head, fast_rows
        self.pdl = programmatic(head.device)

    def decoder(self, rows: Rows, cache: KVCache) -> Decoder:
        """What decodes frame after frame: by replaying one CUDA graph, or in the interpreter from the host."""
        if self.head.is_cuda:
            return FrameGraph(self, rows, cache)
        return HostDecoder(self.config, rows, cache, self)

    def __call__(
        self, tokens: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor],
        main_window: Tensor | None, fast_window: Tensor | None, main_noise: Tensor, ras_noise: Tensor | None,
        fast_noise: Tensor, temperature: Tensor, top_p: Tensor, repetition_penalty: Tensor, top_k: Tensor,
        ids: Tensor | None, logit_bias: Tensor | None, main_logits: Tensor, fast_logits: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        """Decode one frame; arguments and results are those of `s1kernels.ops.decode_frame`, already checked."""
        fast = [] if fast_window is None else list(fast_window.unbind(1))
        scalars = {"temperature": temperature, "top_p": top_p, "repetition_penalty": repetition_penalty, "top_k": top_k}
        self.enqueue(
            Buffers(self.config, tokens.shape[0], self.head), tokens, position, k_caches, v_caches, main_window, fast,
            Randomness(main_noise, ras_noise, fast_noise), scalars, ids, logit_bias, main_logits, fast_logits, out,
        )  # fmt: skip

    def slow_step(
        self, tokens: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], logits: Tensor,
        hidden: Tensor, normed: Tensor,
    ) -> None:  # fmt: skip
        """The slow transformer alone: logits [B, V] float32, hidden (before the last norm) and normed [B, C]."""
        buffers = Buffers(self.config, tokens.shape[0], self.head)
        self._slow(buffers, tokens, position, k_caches, v_caches, hidden)
        eps = self.config.norm_eps
        rms_norm_logits.enqueue(hidden, self.weights.norm, self.head, eps, logits, normed, pdl=self.pdl)

    def enqueue(
        self, buffers: Buffers, tokens: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor],
        main_window: Tensor | None, fast_windows: list[Tensor], random: Randomness, scalars: dict[str, Tensor],
        ids: Tensor | None, logit_bias: Tensor | None, main_logits: Tensor, fast_logits: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        """One frame on these tensors. Windows: [B, W] of any strides."""
        c, w, B, pdl = self.config, self.weights, tokens.shape[0], self.pdl
        x, normed = buffers.x, buffers.normed if c.norm_fast_input else None
        self._slow(buffers, tokens, position, k_caches, v_caches, x)
        rms_norm_logits.enqueue(x, w.norm, self.head, c.norm_eps, main_logits, normed, logit_bias, pdl=pdl)
        hidden = x if normed is None else normed
        if w.project_weight is not None:
            assert buffers.projected is not None
            linear_residual.enqueue(hidden, w.project_weight, w.project_bias, None, buffers.projected, pdl=pdl)
            hidden = buffers.projected
        common: dict[str, Any] = dict(
            **scalars, rng=random.state, uniform=random.uniform, semantic_begin=c.semantic_begin,
            semantic_end=c.semantic_end, codebook_size=c.codebook_size, embedding=w.fast_embedding, pdl=pdl,
        )  # fmt: skip
        fast_x = buffers.fast_x
        second = fast_x.view(B, 2, c.fast.dim)[:, 1]
        sample_token.enqueue(
            logits=main_logits, noise=random.main, ras_noise=random.ras, window=main_window, ids=ids,
            ras_offset=random.ras_offset, threads=random.main_threads, out=out[:, 0], code=out[:, 1], hidden=hidden,
            next_x=second, ras=c.line == "2.0" and (random.ras is not None or random.state is not None), **common,
        )  # fmt: skip
        fast_head = w.fast_head[: self.fast_rows]
        for i in range(1, c.codebooks):
            pair = i == 1  # positions 0 and 1 need no draw between them: one pass of two rows a sequence
            passed = fast_x if pair else fast_x[:B]
            self._fast(buffers, passed, first=0 if pair else i)
            logits, last = fast_logits[:, i - 1], second if pair else passed
            rms_norm_logits.enqueue(last, w.fast_norm, fast_head, c.norm_eps, logits, None, pdl=pdl)
            sample_token.enqueue(
                logits=logits, noise=None if random.fast is None else random.fast[:, i - 1], ras_noise=None,
                window=fast_windows[i - 1] if fast_windows else None, ids=None, ras=False,
                offset=random.fast_offsets[i - 1] if random.fast_offsets else 0, threads=random.fast_threads,
                out=out[:, i + 1], next_x=fast_x[:B], **common,
            )  # fmt: skip

    def _slow(
        self, buffers: Buffers, tokens: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor],
        x: Tensor,
    ) -> None:  # fmt: skip
        """Embedding and slow stack; x [B, C] receives the hidden state before the last norm."""
        c, w, b, pdl, eps = self.config, self.weights, buffers.slow_stack, self.pdl, self.config.norm_eps
        # The frame's first launch waits for all before it: the other kernels may read what earlier frames wrote
        # before they wait.
        embed_frame.enqueue(
            tokens, w.text_embedding, w.codebook_embedding, c.semantic_begin, c.semantic_end,
            c.scale_codebook_embeddings, x, hurry=pdl,
        )  # fmt: skip
        for layer, k_cache, v_cache in zip(w.slow, k_caches, v_caches, strict=True):
            rms_norm_qkv.enqueue(x, layer.attention_norm, layer.wqkv, layer.qkv_bias, eps, b.qkv, pdl=pdl)
            attention_decode.append(
                b.qkv, layer.q_norm, layer.k_norm, w.cos_sin, position, k_cache, v_cache, eps, b.attended,
                buffers.scratch, pdl=pdl,
            )  # fmt: skip
            linear_residual.enqueue(b.attended.flatten(1), layer.wo, layer.o_bias, x, x, pdl=pdl)
            self._feed_forward(layer, x, b.gated)

    def _fast(self, buffers: Buffers, x: Tensor, first: int) -> None:
        """x [B*T, C] through the fast stack, in place, at positions from `first` on."""
        c, w, pdl, eps, stack = self.config, self.weights, self.pdl, self.config.norm_eps, self.config.fast
        rows, b = x.shape[0], buffers.fast_stack
        qkv, gated = b.qkv[:rows], b.gated[:rows]
        for layer, k_cache, v_cache in zip(w.fast, buffers.fast_k, buffers.fast_v, strict=True):
            rms_norm_qkv.enqueue(x, layer.attention_norm, layer.wqkv, layer.qkv_bias, eps, qkv, pdl=pdl)
            given = (layer.q_norm, layer.k_norm, w.fast_cos_sin)
            if attention_output.fits(stack.heads, stack.head_dim, c.codebooks):
                attention_output.enqueue(
                    qkv, *given, first, k_cache, v_cache, eps, layer.wo, layer.o_bias, x, heads=stack.heads, pdl=pdl
                )
            else:
                B, q, attended = k_cache.shape[0], b.q[:rows], b.attended[:rows]
                here = torch.arange(first, first + rows // B, dtype=torch.int32, device=x.device).repeat(B)
                qk_norm_rotary_append(qkv, *given, here, k_cache, v_cache, eps, q)
                attention_decode.attention_decode(q, k_cache, v_cache, here + 1, attended)
                linear_residual.enqueue(attended.flatten(1), layer.wo, layer.o_bias, x, x, pdl=pdl)
            self._feed_forward(layer, x, gated)

    def _feed_forward(self, layer: LayerWeights, x: Tensor, gated: Tensor) -> None:
        eps = self.config.norm_eps
        rms_norm_swiglu.enqueue(x, layer.ffn_norm, layer.w1, layer.w3, eps, gated, pdl=self.pdl)
        linear_residual.enqueue(gated, layer.w2, None, x, x, pdl=self.pdl)


class FrameGraph(frame_graph.FrameGraph):
    """The graph of a bound model.

    Args:
        frame: the bound model. rows: the rows of the head that are sampled. cache: the slow stack's keys and values.
    """

    def __init__(self, frame: Frame, rows: Rows, cache: KVCache) -> None:
        super().__init__(frame.config, rows, cache)
        self.frame, self._buffers = frame, Buffers(frame.config, 1, frame.head)

    def _make_ready(self) -> None:
        self._rehearse()

    def _enqueue(self) -> None:
        config, window = self.config, self._window
        if config.line == "s1":  # upstream's: the main token is held against the window's first frame, codes and all
            main, fast = window[None, :, 0], [window[None, i] for i in range(2, config.codebooks + 1)]
        else:
            main, fast = window[None, 0], []
        self.frame.enqueue(
            self._buffers, self._tokens, self._position, self.cache.k, self.cache.v, main, fast,
            self._draws.randomness(self._random), self._scalars, self.rows.ids, self.rows.bias, self.main_logits,
            self.fast_logits, self._codes,
        )  # fmt: skip
        advance(
            self._tokens, self._codes, self._position, window, self._index, self._random, self._draws.numbers,
            fills_first=config.line == "s1", pdl=self.frame.pdl,
        )  # fmt: skip


def advance(
    tokens: Tensor, codes: Tensor, position: Tensor, window: Tensor, index: Tensor, random: Tensor, numbers: int, *,
    fills_first: bool, pdl: bool = False,
) -> None:  # fmt: skip
    """The state after a frame; see `advance_kernel`."""
    rows, W = window.shape
    launch(
        advance_kernel, (1,), tokens.device, tokens, codes, position, window, index, random, rows - 1, W, numbers,
        FILLS_FIRST=fills_first, ROWS=power_of_2(rows), COLUMNS=power_of_2(W), pdl=pdl, num_warps=1,
    )  # fmt: skip


@implement("decode_frame", backend="triton", supports=supports, bind=Frame)
def decode_frame(
    tokens: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], main_window: Tensor | None,
    fast_window: Tensor | None, main_noise: Tensor, ras_noise: Tensor | None, fast_noise: Tensor, temperature: Tensor,
    top_p: Tensor, repetition_penalty: Tensor, top_k: Tensor, ids: Tensor | None, logit_bias: Tensor | None,
    head: Tensor, weights: list[Tensor], config: str, out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    codes, main_logits, fast_logits = out
    shape = DualARConfig.from_json(config)
    frame = Frame(shape, Weights.unflatten(shape, weights), head, fast_noise.shape[2])
    frame(
        tokens, position, k_caches, v_caches, main_window, fast_window, main_noise, ras_noise, fast_noise, temperature,
        top_p, repetition_penalty, top_k, ids, logit_bias, main_logits, fast_logits, codes,
    )  # fmt: skip
