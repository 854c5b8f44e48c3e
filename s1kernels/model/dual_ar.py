"""The DualAR model, written once from the ops: the meaning of `decode_frame`, and its program op by op.

Source: fish_speech/models/text2semantic/llama.py and inference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s1kernels.model.config import DualARConfig
from s1kernels.model.weights import LayerWeights, Weights


class DualAR:
    """A slow transformer over frames whose hidden state a fast transformer turns into a frame's codes.

    Args:
        config: the shape.
        weights: its tensors, all of one floating dtype.
        ops: who computes: an object with one callable per op, such as `s1kernels.ops.references`.
    """

    def __init__(self, config: DualARConfig, weights: Weights, ops: Any) -> None:
        self.config, self.weights, self.ops = config, weights, ops

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, N+1] int32 tokens -> [B, C]."""
        c, w = self.config, self.weights
        return self.ops.embed_frame(
            tokens,
            w.text_embedding,
            w.codebook_embedding,
            c.semantic_begin,
            c.semantic_end,
            c.scale_codebook_embeddings,
        )

    def stack(
        self,
        x: Tensor,
        layers: list[LayerWeights],
        cos_sin: Tensor,
        position: Tensor,
        k_caches: list[Tensor],
        v_caches: list[Tensor],
    ) -> Tensor:
        """[B, C] through a stack; row b stands at `position[b]`, appends itself to its cache and sees all up to
        there."""
        eps, ops, length = self.config.norm_eps, self.ops, position + 1
        for layer, k_cache, v_cache in zip(layers, k_caches, v_caches, strict=True):
            qkv = ops.rms_norm_qkv(x, layer.attention_norm, layer.wqkv, layer.qkv_bias, eps)
            q = ops.qk_norm_rotary_append(qkv, layer.q_norm, layer.k_norm, cos_sin, position, k_cache, v_cache, eps)
            attended = ops.attention_decode(q, k_cache, v_cache, length).flatten(1)
            x = ops.linear_residual(attended, layer.wo, layer.o_bias, x)
            hidden = ops.rms_norm_swiglu(x, layer.ffn_norm, layer.w1, layer.w3, eps)
            x = ops.linear_residual(hidden, layer.w2, None, x)
        return x

    def slow_step(self, tokens: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor]) -> Tensor:
        """One new frame a sequence, [B, N+1] -> [B, C] before the final norm. B sequences, a cache each."""
        return self.stack(self.embed(tokens), self.weights.slow, self.weights.cos_sin, position, k_caches, v_caches)

    def prefill(self, tokens: Tensor, start: int, k_caches: list[Tensor], v_caches: list[Tensor]) -> None:
        """Write the k and v of one sequence's frames, [T, N+1] from position `start` on, into its caches."""
        self.read(self.embed(tokens), start, k_caches, v_caches)

    def read(self, x: Tensor, start: int, k_caches: list[Tensor], v_caches: list[Tensor]) -> Tensor:
        """[T, C] of one sequence, from position `start` on, through the slow stack at once.

        Between our ops, the framework's matrix products and attention do the work: over many rows they are at their
        best.
        """
        c, w, ops, T = self.config, self.weights, self.ops, x.shape[0]
        position = torch.arange(start, start + T, dtype=torch.int32, device=x.device)
        mask = None if start == 0 else position[:, None] >= torch.arange(start + T, device=x.device)
        for layer, k_cache, v_cache in zip(w.slow, k_caches, v_caches, strict=True):
            n = ops.rms_norm(x, layer.attention_norm, c.norm_eps)
            qkv = F.linear(n, layer.wqkv, layer.qkv_bias)
            q = ops.qk_norm_rotary_append(
                qkv, layer.q_norm, layer.k_norm, w.cos_sin, position, k_cache, v_cache, c.norm_eps
            )
            del n, qkv  # attention wants the room
            k, v = (cache[:, :, : start + T] for cache in (k_cache, v_cache))
            x = x + F.linear(attend(q, k, v, mask), layer.wo, layer.o_bias)
            n = ops.rms_norm(x, layer.ffn_norm, c.norm_eps)
            x = x + F.linear(ops.swiglu(F.linear(n, layer.w1), F.linear(n, layer.w3)), layer.w2)
        return x

    def decode_frame(
        self,
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next frame of B sequences; `s1kernels.ops.decode_frame` documents arguments and results."""
        c, w, ops = self.config, self.weights, self.ops
        sampling = (temperature, top_p, repetition_penalty, top_k, c.semantic_begin, c.semantic_end)
        x = self.slow_step(tokens, position, k_caches, v_caches)
        main_logits, normed = ops.rms_norm_logits(x, w.norm, head, c.norm_eps)
        if logit_bias is not None:
            main_logits = main_logits + logit_bias
        main = ops.sample_token(main_logits, main_noise, ras_noise, main_window, ids, *sampling)

        hidden = normed if c.norm_fast_input else x
        if w.project_weight is not None:
            hidden = ops.linear_residual(hidden, w.project_weight, w.project_bias, None)
        B, K = main_logits.shape[0], fast_noise.shape[2]
        fast_logits = main_logits.new_empty(B, c.codebooks - 1, K)
        codes = [main, (main - c.semantic_begin).clamp(0, c.codebook_size - 1)]
        k_caches, v_caches = (self._fast_caches(B, x) for _ in range(2))
        for i in range(1, c.codebooks):
            x = w.fast_embedding[codes[i].long()]
            position = torch.full((B,), i, dtype=torch.int32, device=x.device)
            if i == 1:  # positions 0 and 1 need no draw between them: one pass of two rows a sequence
                x = torch.stack([hidden, x], dim=1).flatten(0, 1)
                position = torch.stack([position - 1, position], dim=1).flatten()
            x = self.stack(x, w.fast, w.fast_cos_sin, position, k_caches, v_caches)
            x = x.view(B, -1, c.fast.dim)[:, -1].contiguous()
            logits, _ = ops.rms_norm_logits(x, w.fast_norm, w.fast_head[:K], c.norm_eps)
            fast_logits[:, i - 1] = logits
            window = None if fast_window is None else fast_window[:, i - 1].contiguous()
            codes.append(ops.sample_token(logits, fast_noise[:, i - 1].contiguous(), None, window, None, *sampling))
        return torch.stack(codes, dim=1), main_logits, fast_logits

    def _fast_caches(self, rows: int, like: Tensor) -> list[Tensor]:
        """Zeros, for plain torch calls multiply what they mask."""
        stack = self.config.fast
        shape = (rows, stack.kv_heads, self.config.codebooks, stack.head_dim)
        return [like.new_zeros(shape) for _ in range(stack.layers)]


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor | None) -> Tensor:
    """[T, H*D], the attention of q [T, H, D] over one sequence's k and v [1, G, S, D].

    `mask` [T, S] says which positions a row sees; None: none that come later. The copies of k and v, one for every
    query head, are gone when this returns.
    """
    k, v = (cache.repeat_interleave(q.shape[1] // cache.shape[1], dim=1) for cache in (k_cache, v_cache))
    y = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None)
    return y[0].transpose(0, 1).flatten(1)
