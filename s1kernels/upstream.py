"""Reads an upstream model, recognised by its structure: its shape, its weights where they lie, its caches."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from s1kernels.cache import KVCache, resized
from s1kernels.model.config import DualARConfig, Line, from_upstream
from s1kernels.model.weights import Weights

PARTS = (
    "embeddings",
    "codebook_embeddings",
    "layers",
    "norm",
    "fast_embeddings",
    "fast_layers",
    "fast_norm",
    "fast_output",
)
"""What makes a module a DualAR transformer."""

END_TOKEN = "<|im_end|>"


def require_dual_ar(model: object) -> None:
    """Raise TypeError unless `model` has the parts of a DualAR transformer."""
    missing = [part for part in PARTS if not hasattr(model, part)]
    if missing or not isinstance(model, nn.Module):
        raise TypeError(
            f"patch: model must be Fish-Speech's DualAR transformer, got {type(model).__name__} "
            f"without {', '.join(missing) or 'nn.Module'}; pass the model that upstream's init_model returns"
        )


def read_config(model: Any, line: Line) -> DualARConfig:
    """The shape of an upstream model.

    Raises:
        TypeError: the model does not generate speech; ValueError: its config or tokenizer lacks something.
    """
    args = dict(vars(model.config))
    if args.get("is_reward_model"):
        raise TypeError("patch: model must generate speech, got a reward model; patch the text-to-speech model")
    holder = model.config if line == "2.0" else model.tokenizer
    if getattr(model, "tokenizer", None) is None or getattr(holder, "semantic_begin_id", None) is None:
        raise ValueError(
            "patch: model.tokenizer must be set (it names the semantic range and the end token), got none; "
            "load the model with upstream's from_pretrained"
        )
    return from_upstream(
        args | {"model_type": "dual_ar", "tie_word_embeddings": not hasattr(model, "output")},
        semantic_begin=holder.semantic_begin_id,
        semantic_end=holder.semantic_end_id,
        end_token=model.tokenizer.get_token_id(END_TOKEN),
        line=line,
    )


def read_weights(model: Any, config: DualARConfig) -> Weights:
    """The weights of an upstream model, sharing its storage.

    Raises:
        TypeError: a layer is quantised, carries LoRA, or is otherwise not a plain linear layer; mixed dtypes.
        ValueError: a weight is missing, misshapen, on another device or not finite; the message names it.
    """
    for name, module in model.named_modules():
        if name.startswith(("layers.", "fast_layers.", "output", "fast_output", "fast_project_in")):
            _check_module(name, module)
    parameters = dict(model.named_parameters())
    weights = Weights.from_state_dict(config, parameters)
    first = weights.norm
    for name, tensor in parameters.items():
        if tensor.device != first.device or tensor.dtype != first.dtype:
            raise TypeError(
                f"patch: {name} must be {first.dtype} on {first.device} like the rest, got {tensor.dtype} on "
                f"{tensor.device}; call model.to(device, dtype)"
            )
        if tensor.device.type == "meta":
            raise ValueError(f"patch: {name} must hold data, got a meta tensor; load the weights first")
        if not all(bound.isfinite() for bound in torch.aminmax(tensor.detach())):
            raise ValueError(f"patch: {name} must be finite, got NaN or infinity; is the checkpoint damaged?")
    slow, fast = (table.to(first).contiguous() for table in (model.freqs_cis, model.fast_freqs_cis))
    return dataclasses.replace(weights, cos_sin=slow, fast_cos_sin=fast)


def _check_module(name: str, module: nn.Module) -> None:
    leaf = name.rsplit(".", 1)[-1]
    linear = leaf in ("wqkv", "wo", "w1", "w2", "w3", "output", "fast_output")
    if linear and not isinstance(module, nn.Linear):
        raise TypeError(
            f"patch: {name} must be an nn.Linear, got {type(module).__name__}; quantised models are not supported"
        )
    if any(hasattr(module, mark) for mark in ("lora_A", "lora_down", "parametrizations")):
        raise TypeError(
            f"patch: {name} must be plain, got {type(module).__name__} with adapters; merge LoRA weights first"
        )
    if linear and type(module.weight.data) is not Tensor:
        raise TypeError(
            f"patch: {name}.weight must be a plain tensor, got {type(module.weight.data).__name__}; dequantise it"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise TypeError(
            f"patch: {name} must have no forward hooks (the fused step would not run them); remove them first"
        )


def storage(model: Any) -> Iterator[Any]:
    """What an engine relies on: where every parameter lies, and how often it was written, since copies are made."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter.data_ptr()
                yield parameter.dtype
                yield None if parameter.is_inference() else parameter._version


class UpstreamCache(KVCache):
    """The cache modules of an upstream model, so that its own prefill and ours see the same keys and values.

    Upstream allocates all of max_seq_len at once and attends over all of it. Here the tensors start small and grow;
    `model.max_seq_len`, which upstream's mask follows, grows with them. `limit` is what upstream asked for.
    """

    def __init__(self, config: DualARConfig, model: Any, first: int) -> None:
        self.config, self.first = config, min(first, config.max_positions)
        self.model = weakref.ref(model)
        self.limit = model.max_seq_len

    @property
    def k(self) -> list[Tensor]:  # type: ignore[override]
        return self._tensors("k_cache")

    @property
    def v(self) -> list[Tensor]:  # type: ignore[override]
        return self._tensors("v_cache")

    @property
    def capacity(self) -> int:
        model = self._model()
        return 0 if model.layers[0].attention.kv_cache is None else model.layers[0].attention.kv_cache.k_cache.shape[2]

    def reserve(self, positions: int) -> None:
        if self.capacity == 0:
            self.setup(1, self.config.max_positions, self._model().norm.weight.dtype)
        super().reserve(positions)

    def setup(self, max_batch_size: int, max_seq_len: int, dtype: torch.dtype) -> None:
        """Serve upstream's setup_caches: note the limit, allocate the first part."""
        model, original = self._model(), type(self._model()).setup_caches
        original = getattr(original, "__wrapped__", original)
        self.limit = max(self.limit, max_seq_len)
        room = max_seq_len if max_batch_size > 1 else min(max_seq_len, max(self.first, self.capacity))
        with torch.inference_mode(False), torch.device(model.norm.weight.device):
            original(model, max_batch_size, room, dtype)

    def _resize(self, capacity: int) -> None:
        model, before = self._model(), self.capacity
        caches = [layer.attention.kv_cache for layer in model.layers]
        with torch.inference_mode(False):
            try:
                for cache in caches:
                    cache.k_cache, cache.v_cache = resized(cache.k_cache, capacity), resized(cache.v_cache, capacity)
            except torch.cuda.OutOfMemoryError:
                for cache in caches:  # all of one size again
                    if cache.k_cache.shape[2] != before:
                        cache.k_cache, cache.v_cache = resized(cache.k_cache, before), resized(cache.v_cache, before)
                raise
        model.max_seq_len = capacity

    def _tensors(self, name: str) -> list[Tensor]:
        model = self._model()
        tensors = [getattr(layer.attention.kv_cache, name) for layer in model.layers]
        dtype = model.norm.weight.dtype
        if tensors[0].dtype != dtype:
            raise TypeError(
                f"setup_caches: dtype must be {dtype} like the weights, got {tensors[0].dtype}; "
                "call model.setup_caches(..., dtype=next(model.parameters()).dtype)"
            )
        return tensors if tensors[0].shape[0] == 1 else [tensor[:1] for tensor in tensors]

    def _model(self) -> Any:
        model = self.model()
        if model is None:
            raise RuntimeError("patch: the model was deleted while it was decoding; keep a reference to it")
        return model
