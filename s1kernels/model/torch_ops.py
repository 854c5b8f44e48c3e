"""The ops in plain torch calls, for one sequence: what the framework does without our kernels.

Nothing here looks at the device from the host and no shape depends on a value, so a frame made of these ops can be
captured in a CUDA graph, compiled by torch.compile and exported to ONNX. `DualAR(config, weights, torch_ops)` is such a
model. Arguments and results are those of `s1kernels.ops`, with R = 1; ranges are not checked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from s1kernels.ops._math import normalize
from s1kernels.ops.sample_token import RAS_TEMPERATURE, RAS_TOP_P


def embed_frame(
    tokens: Tensor, text_embedding: Tensor, codebook_embedding: Tensor, semantic_begin: int, semantic_end: int,
    scale: bool,
) -> Tensor:  # fmt: skip
    main, codes = tokens[:, 0].long(), tokens[:, 1:].long()
    offsets = torch.arange(codes.shape[1], device=codes.device) * (codebook_embedding.shape[0] // codes.shape[1])
    semantic = ((main >= semantic_begin) & (main <= semantic_end))[:, None]
    text = text_embedding[main]
    summed = text + codebook_embedding[torch.where(semantic, codes, 0) + offsets].sum(1)
    return torch.where(semantic, summed * tokens.shape[1] ** -0.5 if scale else summed, text)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.onnx.is_in_onnx_export():  # which has no such op before opset 23
        return normalize(x, weight, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm_qkv(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.linear(rms_norm(x, norm_weight, eps), weight, bias)


def qk_norm_rotary_append(
    qkv: Tensor, q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, cos_sin: Tensor, position: Tensor,
    k_cache: Tensor, v_cache: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    (T, columns), (_, G, _, D) = qkv.shape, k_cache.shape
    q, k, v = qkv.view(T, columns // D, D).split([columns // D - 2 * G, G, G], dim=1)
    at = position.long()
    angle = cos_sin[at][:, None].float()
    q, k = (
        _rotate(x if weight is None else rms_norm(x, weight, eps), angle)
        for x, weight in ((q, q_norm_weight), (k, k_norm_weight))
    )
    k_cache.index_copy_(2, at, k.transpose(0, 1)[None])
    v_cache.index_copy_(2, at, v.transpose(0, 1)[None])
    return q


def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor) -> Tensor:
    """Attends over the whole cache, as a static shape has it, and masks what lies past `length`: it must be finite."""
    (T, H, D), (_, G, S, _) = q.shape, k_cache.shape
    grouped = (q * D**-0.5).view(T, G, H // G, D).transpose(0, 1).reshape(G, T * (H // G), D)
    scores = (grouped @ k_cache[0].transpose(1, 2)).float().view(G, T, H // G, S)
    seen = torch.arange(S, device=q.device) < length[:, None]
    weights = torch.softmax(scores.masked_fill(~seen[None, :, None], -torch.inf), dim=-1).to(q.dtype)
    attended = weights.view(G, T * (H // G), S) @ v_cache[0]
    return attended.view(G, T, H // G, D).transpose(0, 1).reshape(T, H, D)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual


def rms_norm_swiglu(x: Tensor, norm_weight: Tensor, w1: Tensor, w3: Tensor, eps: float) -> Tensor:
    normed = rms_norm(x, norm_weight, eps)
    return swiglu(F.linear(normed, w1), F.linear(normed, w3))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rms_norm_logits(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed = rms_norm(x, norm_weight, eps)
    return F.linear(normed, weight).float(), normed


def sample_token(
    logits: Tensor, noise: Tensor, ras_noise: Tensor | None, window: Tensor | None, ids: Tensor | None,
    temperature: Tensor, top_p: Tensor, repetition_penalty: Tensor, top_k: Tensor, semantic_begin: int,
    semantic_end: int,
) -> Tensor:  # fmt: skip
    tokens = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32) if ids is None else ids
    seen = None if window is None else (tokens[None, :, None] == window[:, None]).any(-1)
    if ras_noise is None and seen is not None:
        penalized = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    row = _draw(logits, noise, temperature, top_p, top_k)
    if ras_noise is not None and seen is not None:
        hot, wide = logits.new_full((), RAS_TEMPERATURE), logits.new_full((), RAS_TOP_P)
        again = seen.gather(1, row)[:, 0] & (tokens[row[:, 0]] >= semantic_begin) & (tokens[row[:, 0]] <= semantic_end)
        row = torch.where(again[:, None], _draw(logits, ras_noise, hot, wide, top_k), row)
    return tokens[row[:, 0]]


def _draw(logits: Tensor, noise: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """[B, 1] int64: the rows drawn."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    cumulative = torch.softmax(ordered, dim=-1).cumsum(-1)
    rank = torch.arange(logits.shape[1], device=logits.device)
    keep = ((cumulative <= top_p) | (top_p >= 1)) & ((rank < top_k) | (top_k <= 0)) | (rank == 0)
    odds = torch.exp((ordered - ordered[:, :1]) / temperature.clamp(min=1e-5)) / noise.gather(1, order)
    return order.gather(1, torch.where(keep, odds, -1.0).argmax(-1, keepdim=True))


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = angle.unbind(-1)
    return torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2).to(x.dtype)
