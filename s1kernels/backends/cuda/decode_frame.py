"""decode_frame on CUDA: a frame as a list of launches, put together once and enqueued, or captured, as often as needed.

Kernels of its own are csrc/cuda/decode_frame.cu; the rest are those of the ops.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from s1kernels.backends.cuda import (
    attention_decode,
    embed_frame,
    linear_residual,
    persistent_frame,
    providers,
    qk_norm_rotary_append,
    rms_norm_logits,
    rms_norm_qkv,
    rms_norm_swiglu,
    sample_token,
)
from s1kernels.backends.cuda.frame_graph import FrameGraph
from s1kernels.backends.cuda.launch import Kernel, Launch
from s1kernels.backends.cuda.packed_weights import NoHalvesError, PackedWeights
from s1kernels.backends.cuda.sample_token import Window
from s1kernels.backends.cuda.support import TILE_ROWS, ceil_div, run, staging, supports, vectorized
from s1kernels.cache import KVCache
from s1kernels.draws import Randomness
from s1kernels.model.config import DualARConfig, StackConfig
from s1kernels.model.weights import LayerWeights, Weights
from s1kernels.registry import implement
from s1kernels.sampling import Rows

logger = logging.getLogger("s1kernels")

ATTENTION_OUTPUT = {
    (dim, group): Kernel(
        "decode_frame", f"attention_output_d{dim}_g{group}", block=256,
        pointers="qkv k_cache v_cache q_norm_weight k_norm_weight cos_sin weight bias residual out",
        ints="rows first heads kv_heads capacity out_dim", floats="eps",
    )
    for dim in (64, 128)
    for group in (1, 2, 4)
}  # fmt: skip
"""(D, H/G) -> attention over a few positions and its projection, in one launch."""
ALWAYS = ["advance", "embed_frame", "qk_norm_rotary_append", "rms_norm", "swiglu"]
"""Sources of the kernels between frames and of a prompt."""
FRAME_OF_OPS = [
    "attention_decode", "decode_frame", "linear_residual", "rms_norm_logits", "rms_norm_qkv", "rms_norm_swiglu",
    "sample_token",
]  # fmt: skip
MOST_FAST_POSITIONS = 16  # that ATTENTION_OUTPUT looks back on


class Frame:
    """A model bound to its launches.

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
        self.persistent: str | None = "not asked for"
        """Why a frame is not one persistent kernel, or None if it is."""
        self.packed: PackedWeights | None = None
        """The copy of the matrices that the persistent kernel streams, if it has one."""
        self.unpacked: str | None = "not asked for"
        """Why it has none, or None if it has."""
        self._packs = False

    def use_persistent(self, packed: bool) -> None:
        """Make the frame one persistent kernel, if GPU and model allow it; `persistent` says why not. `packed`: let it
        have a copy of the matrices."""
        self.persistent = persistent_frame.refusal(self.config, self.weights, self.head, self.fast_rows)
        self._packs = packed

    def decoder(self, rows: Rows, cache: KVCache) -> FrameGraph:
        """What decodes frame after frame by replaying one CUDA graph. Its kernels are made ready now, side by side."""
        kind = f"a graph of the ops' kernels: {self.persistent}" if self.persistent else "one persistent kernel"
        logger.info("cuda: a frame is %s", kind)
        providers.prepare(
            [*ALWAYS, *(FRAME_OF_OPS if self.persistent else ["persistent_frame"])], self.head.dtype, self.head.device
        )
        if self._packs and self.persistent is None and self.packed is None:
            try:
                self.packed, self.unpacked = persistent_frame.Phases(self.config, self.weights, self.head).pack(), None
            except NoHalvesError as error:
                self.unpacked = str(error)
                logger.warning("cuda: weights are streamed as they lie, packed ones would bring nothing: %s", error)
        return FrameGraph(self, rows, cache)

    def __call__(
        self, tokens: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor],
        main_window: Tensor | None, fast_window: Tensor | None, main_noise: Tensor, ras_noise: Tensor | None,
        fast_noise: Tensor, temperature: Tensor, top_p: Tensor, repetition_penalty: Tensor, top_k: Tensor,
        ids: Tensor | None, logit_bias: Tensor | None, main_logits: Tensor, fast_logits: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        """Decode one frame; arguments and results are those of `s1kernels.ops.decode_frame`, already checked."""
        main, fast = Window(), []
        if main_window is not None:
            main = Window(main_window, main_window.shape[1], 1, main_window.shape[1])
        for i in range(fast_noise.shape[1] if fast_window is not None else 0):
            assert fast_window is not None
            fast.append(Window(fast_window[:, i], fast_window.shape[2], 1, fast_window.stride(0)))
        scalars = {"temperature": temperature, "top_p": top_p, "repetition_penalty": repetition_penalty, "top_k": top_k}
        launches = self.launches(
            tokens, position, k_caches, v_caches, main, fast, Randomness(main_noise, ras_noise, fast_noise), scalars,
            ids, logit_bias, main_logits, fast_logits, out,
        )  # fmt: skip
        run(launches, tokens.device)

    def slow_step(
        self, tokens: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], logits: Tensor,
        hidden: Tensor, normed: Tensor,
    ) -> None:  # fmt: skip
        """The slow transformer alone: logits [B, V] float32, hidden (before the last norm) and normed [B, C]."""
        launches = [
            *self._slow(tokens, position, k_caches, v_caches, hidden),
            *rms_norm_logits.launches(hidden, self.weights.norm, self.head, self.config.norm_eps, logits, normed),
        ]
        run(launches, tokens.device)

    def launches(
        self, tokens: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], main_window: Window,
        fast_windows: list[Window], random: Randomness, scalars: dict[str, Tensor], ids: Tensor | None,
        logit_bias: Tensor | None, main_logits: Tensor, fast_logits: Tensor, out: Tensor,
    ) -> list[Launch]:  # fmt: skip
        """One frame on these tensors, in order. Buffers between the launches live as long as the launches do."""
        c, w, B = self.config, self.weights, tokens.shape[0]
        x, normed = (self.head.new_empty(B, c.slow.dim) for _ in range(2))
        fast_x = self.head.new_empty(2 * B, c.fast.dim)
        launches = self._slow(tokens, position, k_caches, v_caches, x)
        launches += rms_norm_logits.launches(x, w.norm, self.head, c.norm_eps, main_logits, normed)
        hidden = normed if c.norm_fast_input else x
        if w.project_weight is not None:
            projected = self.head.new_empty(B, c.fast.dim)
            launches += linear_residual.launches(hidden, w.project_weight, w.project_bias, None, projected)
            hidden = projected
        common: dict[str, Any] = dict(
            **scalars, rng=random.state, rng_uniform=random.uniform, semantic_begin=c.semantic_begin,
            semantic_end=c.semantic_end, codebook_size=c.codebook_size, rows=B, dim=c.fast.dim,
            out_stride=out.shape[1],
        )  # fmt: skip
        launches += sample_token.sampling_launches(
            self.head.dtype, self.head.device, logits=main_logits, noise=random.main, ras_noise=random.ras,
            window=main_window, ids=ids, logit_bias=logit_bias, rng_offset=0,
            ras_rng_offset=random.ras_offset, rng_threads=random.main_threads, out=out[:, 0], code=out[:, 1],
            embedding=w.fast_embedding, next_x=fast_x[1:], next_stride=2 * c.fast.dim, hidden=hidden,
            vocabulary=self.head.shape[0],
            ras=c.line == "2.0" and (random.ras is not None or random.state is not None), **common,
        )  # fmt: skip
        k_caches, v_caches = (self._fast_caches(B) for _ in range(2))
        fast_head = w.fast_head[: self.fast_rows]
        for i in range(1, c.codebooks):
            pair = i == 1  # positions 0 and 1 need no draw between them: one pass of two rows a sequence
            passed = fast_x if pair else fast_x[:B]
            launches += self._stack(c.fast, w.fast, passed, k_caches, v_caches, w.fast_cos_sin, first=0 if pair else i)
            last = fast_x[1::2] if pair else passed
            launches += rms_norm_logits.launches(last, w.fast_norm, fast_head, c.norm_eps, fast_logits[:, i - 1], None)
            onward = i + 1 < c.codebooks
            launches += sample_token.sampling_launches(
                self.head.dtype, self.head.device, logits=fast_logits[:, i - 1],
                noise=None if random.fast is None else random.fast[:, i - 1], ras_noise=None,
                window=fast_windows[i - 1] if fast_windows else Window(), ids=None, logit_bias=None,
                rng_offset=random.fast_offsets[i - 1] if random.fast_offsets else 0, ras_rng_offset=0,
                rng_threads=random.fast_threads, out=out[:, i + 1], code=None,
                embedding=w.fast_embedding if onward else None, next_x=fast_x if onward else None,
                next_stride=c.fast.dim, hidden=None, vocabulary=self.fast_rows, ras=False, **common,
            )  # fmt: skip
        return launches

    def _slow(
        self, tokens: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], x: Tensor
    ) -> list[Launch]:
        """Embedding and slow stack; x [B, C] receives the hidden state before the last norm."""
        c, w = self.config, self.weights
        embedded = embed_frame.launches(
            tokens, w.text_embedding, w.codebook_embedding, c.semantic_begin, c.semantic_end,
            c.scale_codebook_embeddings, x, pdl=False,
        )  # fmt: skip
        # The frame's first launch waits for all before it: the other kernels may read what earlier frames wrote
        # before they wait.
        return [*embedded, *self._stack(c.slow, w.slow, x, k_caches, v_caches, w.cos_sin, position=position)]

    def _stack(
        self, stack: StackConfig, layers: list[LayerWeights], x: Tensor, k_caches: list[Tensor],
        v_caches: list[Tensor], cos_sin: Tensor, *, position: Tensor | None = None, first: int = 0,
    ) -> list[Launch]:  # fmt: skip
        """x [B*T, C] through a stack, in place: at `position` (the slow one, T = 1), or from position `first` on."""
        rows, caches, eps = x.shape[0], k_caches[0].shape[0], self.config.norm_eps
        heads, D = stack.heads, stack.head_dim
        qkv, attended = x.new_empty(rows, stack.qkv_rows), x.new_empty(rows, heads * D)
        q, gated = x.new_empty(rows, heads, D), x.new_empty(rows, stack.intermediate)
        refused = attention_decode.refusal(D, heads, stack.kv_heads, x, cos_sin, *k_caches, *v_caches)
        scratch = None
        if not refused:
            scratch = attention_decode.Scratch(rows, heads, stack.kv_heads, D, k_caches[0].shape[2], x.device)
        few = (
            position is None and not refused and caches == 1 and (D, heads // stack.kv_heads) in ATTENTION_OUTPUT
            and self.config.codebooks <= MOST_FAST_POSITIONS and self.fast_rows <= sample_token.SOLO_VOCABULARY
            and vectorized(heads * D, x, *(w.wo for w in layers))
        )  # fmt: skip
        if position is None:
            here = torch.arange(first, first + rows // caches, dtype=torch.int32, device=x.device).repeat(caches)
        else:
            here = position
        launches: list[Launch] = []
        for w, k_cache, v_cache in zip(layers, k_caches, v_caches, strict=True):
            launches += rms_norm_qkv.launches(x, w.attention_norm, w.wqkv, w.qkv_bias, eps, qkv)
            given = (w.q_norm, w.k_norm, cos_sin)
            if few:
                launches.append(
                    ATTENTION_OUTPUT[D, heads // stack.kv_heads].bind(
                        x.dtype, x.device, grid=ceil_div(stack.dim, TILE_ROWS),
                        shared=staging(rows, heads * D, parts=1, loads=4, warps=8)["shared"], qkv=qkv, k_cache=k_cache,
                        v_cache=v_cache, q_norm_weight=w.q_norm, k_norm_weight=w.k_norm, cos_sin=cos_sin, weight=w.wo,
                        bias=w.o_bias, residual=x, out=x, rows=rows, first=first, heads=heads,
                        kv_heads=stack.kv_heads, capacity=k_cache.shape[2], out_dim=stack.dim, eps=eps,
                    )
                )  # fmt: skip
            else:
                out = attended.view(rows, heads, D)
                if position is not None and scratch is not None:
                    launches += attention_decode.append_launches(qkv, *given, here, k_cache, v_cache, eps, out, scratch)
                else:
                    launches += qk_norm_rotary_append.launches(qkv, *given, here, k_cache, v_cache, eps, q)
                    launches += attention_decode.launches(q, k_cache, v_cache, here, out, scratch, ahead=1)
                launches += linear_residual.launches(attended, w.wo, w.o_bias, x, x)
            launches += rms_norm_swiglu.launches(x, w.ffn_norm, w.w1, w.w3, eps, gated)
            launches += linear_residual.launches(gated, w.w2, None, x, x)
        return launches

    def _fast_caches(self, rows: int) -> list[Tensor]:
        stack = self.config.fast
        shape = (rows, stack.kv_heads, self.config.codebooks, stack.head_dim)
        return [self.head.new_empty(shape) for _ in range(stack.layers)]


def _supports(*args: object) -> str | None:
    config = DualARConfig.from_json(str(args[-1]))
    for stack in (config.slow, config.fast):
        if stack.head_dim > attention_decode.MOST_HEAD_DIM:
            return f"head_dim is {stack.head_dim}; the kernels take {attention_decode.MOST_HEAD_DIM} at most"
    return supports(*args)


@implement("decode_frame", backend="cuda", supports=_supports, bind=Frame)
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
