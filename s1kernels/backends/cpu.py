"""The hand-written CPU kernels: `s1kernels._C` behind the ops' contracts. The kernels are csrc/cpu/<op>.cpp."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from s1kernels.model.config import DualARConfig, StackConfig
from s1kernels.model.weights import LayerWeights, Weights
from s1kernels.registry import implement

try:
    from s1kernels import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _missing = f"{error}: installed without a compiler? See `s1kernels info`"

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def available() -> str | None:
    """Why the CPU kernels cannot run on this machine, or None."""
    return _missing if _C is None else None


def _supports(*args: Any) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    for tensor in args:
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}; these kernels are for the CPU"
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype not in _NAMES:
            return f"a tensor is {tensor.dtype}; the kernels take float32, bfloat16 and float16"
    return None


def _at(tensor: Tensor | None) -> int:
    """A tensor's address; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@implement("embed_frame", backend="cpu", supports=_supports)
def embed_frame(
    tokens: Tensor, text_embedding: Tensor, codebook_embedding: Tensor, semantic_begin: int, semantic_end: int,
    scale: bool, out: Tensor,
) -> None:  # fmt: skip
    rows, columns = tokens.shape
    _C.embed_frame(
        _NAMES[out.dtype], _at(tokens), _at(text_embedding), _at(codebook_embedding), _at(out), rows, columns - 1,
        codebook_embedding.shape[0] // (columns - 1), out.shape[1], text_embedding.shape[0], semantic_begin,
        semantic_end, scale, torch.get_num_threads(),
    )  # fmt: skip


@implement("rms_norm_qkv", backend="cpu", supports=_supports)
def rms_norm_qkv(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    _C.rms_norm_qkv(
        _NAMES[x.dtype], _at(x), _at(norm_weight), _at(weight), _at(bias), _at(out), *x.shape, weight.shape[0], eps,
        torch.get_num_threads(),
    )  # fmt: skip


@implement("qk_norm_rotary_append", backend="cpu", supports=_supports)
def qk_norm_rotary_append(
    qkv: Tensor, q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, cos_sin: Tensor, position: Tensor,
    k_cache: Tensor, v_cache: Tensor, eps: float, out: Tensor,
) -> None:  # fmt: skip
    rows, heads, head_dim = out.shape
    caches, kv_heads, capacity, _ = k_cache.shape
    _C.qk_norm_rotary_append(
        _NAMES[qkv.dtype], _at(qkv), _at(q_norm_weight), _at(k_norm_weight), _at(cos_sin), _at(position), _at(k_cache),
        _at(v_cache), _at(out), rows, caches, heads, kv_heads, head_dim, capacity, cos_sin.shape[0], eps,
        torch.get_num_threads(),
    )  # fmt: skip


@implement("attention_decode", backend="cpu", supports=_supports)
def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, out: Tensor) -> None:
    rows, heads, head_dim = q.shape
    caches, kv_heads, capacity, _ = k_cache.shape
    _C.attention_decode(
        _NAMES[q.dtype], _at(q), _at(k_cache), _at(v_cache), _at(length), _at(out), rows, caches, heads, kv_heads,
        head_dim, capacity, torch.get_num_threads(),
    )  # fmt: skip


@implement("linear_residual", backend="cpu", supports=_supports)
def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    _C.linear_residual(
        _NAMES[x.dtype], _at(x), _at(weight), _at(bias), _at(residual), _at(out), *x.shape, weight.shape[0],
        torch.get_num_threads(),
    )  # fmt: skip


@implement("rms_norm_swiglu", backend="cpu", supports=_supports)
def rms_norm_swiglu(x: Tensor, norm_weight: Tensor, w1: Tensor, w3: Tensor, eps: float, out: Tensor) -> None:
    _C.rms_norm_swiglu(
        _NAMES[x.dtype], _at(x), _at(norm_weight), _at(w1), _at(w3), _at(out), *x.shape, w1.shape[0], eps,
        torch.get_num_threads(),
    )  # fmt: skip


@implement("rms_norm_logits", backend="cpu", supports=_supports)
def rms_norm_logits(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, out: tuple[Tensor, Tensor]) -> None:
    logits, normed = out
    _C.rms_norm_logits(
        _NAMES[x.dtype], _at(x), _at(norm_weight), _at(weight), _at(logits), _at(normed), *x.shape, weight.shape[0],
        eps, torch.get_num_threads(),
    )  # fmt: skip


@implement("rms_norm", backend="cpu", supports=_supports)
def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    _C.rms_norm(_NAMES[x.dtype], _at(x), _at(weight), _at(out), *x.shape, eps, torch.get_num_threads())


@implement("swiglu", backend="cpu", supports=_supports)
def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    _C.swiglu(_NAMES[gate.dtype], _at(gate), _at(up), _at(out), *gate.shape, torch.get_num_threads())


@implement("snake", backend="cpu", supports=_supports)
def snake(
    x: Tensor, bias: Tensor | None, alpha: Tensor | None, past_cache: Tensor, turn: Tensor, taps: int, dilation: int,
    stride: int, out: Tensor,
) -> None:  # fmt: skip
    _C.snake(
        _NAMES[x.dtype], _at(x), _at(bias), _at(alpha), _at(past_cache), _at(turn), _at(out), *x.shape,
        past_cache.shape[1], taps, dilation, stride, torch.get_num_threads(),
    )  # fmt: skip


@implement("sample_token", backend="cpu", supports=_supports)
def sample_token(
    logits: Tensor, noise: Tensor, ras_noise: Tensor | None, window: Tensor | None, ids: Tensor | None,
    temperature: Tensor, top_p: Tensor, repetition_penalty: Tensor, top_k: Tensor, semantic_begin: int,
    semantic_end: int, out: Tensor,
) -> None:  # fmt: skip
    _C.sample_token(
        _at(logits), _at(noise), _at(ras_noise), _at(window), _at(ids), _at(out), *logits.shape, _length(window),
        float(temperature), float(top_p), float(repetition_penalty), int(top_k), semantic_begin, semantic_end,
        torch.get_num_threads(),
    )  # fmt: skip


def _length(window: Tensor | None) -> int:
    return 0 if window is None else window.shape[-1]


class Frame:
    """A model bound to the native frame program: one call decodes one frame, with no Python between its ops.

    Args:
        config, weights: the model; the weights are used where they lie and kept alive.
        head: [V, C], the rows of the head that are sampled.
        fast_rows: K', rows of the fast head that are sampled.
    Raises:
        ValueError: a weight is not contiguous or has another dtype than the head.
    """

    def __init__(self, config: DualARConfig, weights: Weights, head: Tensor, fast_rows: int) -> None:
        def stack(stack: StackConfig) -> dict[str, int]:
            names = ("layers", "dim", "heads", "kv_heads", "head_dim", "intermediate")
            return {name: getattr(stack, name) for name in names}

        def addresses(part: Weights | LayerWeights, names: list[str]) -> dict[str, int]:
            for name in names:
                tensor = getattr(part, name)
                if tensor is not None and (tensor.dtype != head.dtype or not tensor.is_contiguous()):
                    expected, got = f"contiguous and {head.dtype}", f"{tensor.dtype} with strides {tensor.stride()}"
                    raise ValueError(f"decode_frame: {name} must be {expected} like head, got {got}; convert it")
            return {name: _at(getattr(part, name)) for name in names}

        def layers(stack: list[LayerWeights]) -> list[dict[str, int]]:
            return [addresses(layer, [f.name for f in fields(LayerWeights)]) for layer in stack]

        plain = [f.name for f in fields(Weights) if f.name not in ("head", "slow", "fast")]
        self._alive = weights, head  # the native frame has addresses only
        self._frame = _C.Frame(
            {
                "dtype": _NAMES[head.dtype], "slow": stack(config.slow), "fast": stack(config.fast),
                "norm_eps": config.norm_eps, "text_rows": weights.text_embedding.shape[0], "head_rows": head.shape[0],
                "fast_rows": fast_rows, "rotary_rows": weights.cos_sin.shape[0], "codebooks": config.codebooks,
                "codebook_size": config.codebook_size, "semantic_begin": config.semantic_begin,
                "semantic_end": config.semantic_end, "scale_codebook_embeddings": config.scale_codebook_embeddings,
                "norm_fast_input": config.norm_fast_input,
            },
            addresses(weights, plain) | {"head": _at(head), "slow": layers(weights.slow), "fast": layers(weights.fast)},
        )  # fmt: skip
        self._caches: tuple = ()

    def __call__(
        self, tokens: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor],
        main_window: Tensor | None, fast_window: Tensor | None, main_noise: Tensor, ras_noise: Tensor | None,
        fast_noise: Tensor, temperature: Tensor, top_p: Tensor, repetition_penalty: Tensor, top_k: Tensor,
        ids: Tensor | None, logit_bias: Tensor | None, main_logits: Tensor, fast_logits: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        """Decode one frame; arguments and results are those of `s1kernels.ops.decode_frame`, already checked.

        Raises:
            ValueError: a token, code or position out of range; nothing was written.
        """
        self._bind_caches(k_caches, v_caches)
        self._frame.decode(
            _at(tokens), _at(position), _at(main_window), _at(fast_window), _at(main_noise), _at(ras_noise),
            _at(fast_noise), _at(ids), _at(logit_bias), _at(main_logits), _at(fast_logits), _at(out), tokens.shape[0],
            _length(main_window), _length(fast_window), _at(temperature), _at(top_p), _at(repetition_penalty),
            _at(top_k), torch.get_num_threads(),
        )  # fmt: skip

    def slow_step(
        self, tokens: Tensor, position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], logits: Tensor,
        hidden: Tensor, normed: Tensor,
    ) -> None:  # fmt: skip
        """The slow transformer alone: logits [B, V] float32, hidden (before the last norm) and normed [B, C].

        Raises:
            ValueError: a token, code or position out of range; nothing was written.
        """
        self._bind_caches(k_caches, v_caches)
        self._frame.slow_step(
            _at(tokens), _at(position), _at(logits), _at(hidden), _at(normed), tokens.shape[0], torch.get_num_threads()
        )

    def _bind_caches(self, k_caches: list[Tensor], v_caches: list[Tensor]) -> None:
        """Tell the native frame where the caches lie, if they have moved."""
        k_ptrs, v_ptrs = [t.data_ptr() for t in k_caches], [t.data_ptr() for t in v_caches]
        caches = (k_ptrs, v_ptrs, k_caches[0].shape[0], k_caches[0].shape[2])
        if caches != self._caches:
            self._frame.set_caches(*caches)
            self._caches = caches


@implement("decode_frame", backend="cpu", supports=_supports, bind=Frame)
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
